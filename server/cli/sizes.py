"""Bytes as people read them."""

from __future__ import annotations


def gib(nbytes: int) -> str:
    """``7.40 GiB``, or ``12.3 MiB`` where it is less than one."""
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:,.2f} GiB"
