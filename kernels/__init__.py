"""Packed 4-bit weights and the kernels that compute with them."""

from nybble.kernels.packed import PackedWeight

__all__ = ["PackedWeight"]
