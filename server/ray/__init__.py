"""Servers placed, restarted and scaled by Ray Serve, behind HAProxy. Needs ``nybble[ray]``."""
