"""``nybble new-key``: an API key and the hash of it."""

from __future__ import annotations


def new_key() -> None:
    """Make an API key, and the line that a tenants file has for it."""
    from nybble.server.tenancy.tenants import new_key as make

    key, stored = make()
    print(f'key (give it to the tenant): {key}\nin the file: keys = ["{stored}"]')
