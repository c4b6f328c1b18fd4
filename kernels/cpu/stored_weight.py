"""What the C++ matmuls are told of packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nybble.kernels.packed import PackedWeight

SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.uint8: 3}


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


@dataclass(frozen=True)
class StoredExperts:
    """What the matmul of a mixture's experts is told of their weights, which are :func:`alike`.

    addresses: int64 ``(experts, 5)``: of codes, scales, zeros, bias (float32) and perm; 0 for none.
        The tensors are the weights' own, and live as long as they do.
    sizes: columns stored for each output, groups, octets of columns in a group, type of scales.
    """

    weights: Sequence[PackedWeight]

    @cached_property
    def addresses(self) -> Tensor:
        # wide_bias is kept by the weight, as the other tensors are.
        tensors = ((w.qweight, w.scales, w.zeros, w.wide_bias, w.perm) for w in self.weights)
        return torch.tensor([[0 if t is None else t.data_ptr() for t in each] for each in tensors])

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        first = self.weights[0]
        octets_per_group = -(-first.group_size // 8)
        return first.columns, first.groups, octets_per_group, SCALE_TYPES[first.scales.dtype]


def alike(weights: Sequence[PackedWeight]) -> bool:
    """Whether one call of the kernel can read all ``weights``."""
    first = weights[0]
    return all(
        (w.out_features, w.in_features, w.columns, w.group_size)
        == (first.out_features, first.in_features, first.columns, first.group_size)
        and w.scales.dtype == first.scales.dtype
        and (w.zeros is None) == (first.zeros is None)
        and torch.equal(w.levels, first.levels)
        for w in weights
    )
