"""Packed 4-bit weights and the kernels that compute with them."""

from nybble.kernels.packed import DenseWeight, PackedWeight

__all__ = ["DenseWeight", "PackedWeight"]
