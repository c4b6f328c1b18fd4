"""What the C++ matmul is told of a packed weight."""

from __future__ import annotations

import torch

from nybble.kernels.packed import PackedWeight

SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class StoredWeight:
    """What the matmul is told of a weight, beside the rows and the outputs.

    A weight of two digits is multiplied in one pass over columns that each have both.

    columns: stored for each output.
    perm: the input feature of each; None if column k is feature k.
    addresses: of codes, scales, zeros, levels and bias. The tensors are the weight's own, and live
        as long as it does.
    sizes: groups, octets of columns in a group, type of scales, digits.
    """

    def __init__(self, weight: PackedWeight) -> None:
        digits = 2 if weight.has_two_digits else 1
        self.columns = weight.columns // digits
        self.perm = weight.perm
        if digits == 2 and self.perm is not None:
            self.perm = self.perm[: self.columns]
            if torch.equal(self.perm, torch.arange(self.columns)):
                self.perm = None
        tensors = weight.qweight, weight.scales, weight.zeros, weight.levels, weight.wide_bias
        self.addresses = tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)
        octets_per_group = -(-weight.group_size // 8)
        scale_type = SCALE_TYPES[weight.scales.dtype]
        self.sizes = weight.groups // digits, octets_per_group, scale_type, digits
