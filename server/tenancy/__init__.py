"""Who asks and how much of it is let in: keys, tenants, rates, admission."""
