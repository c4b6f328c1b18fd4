"""The packed-weight format: one value for every 4-bit linear layer, whatever file it came from.

A code ``q`` (0–15) of output row ``n`` and stored column ``k`` becomes a weight by

    w[n, k] = scale[n, k // group_size] · (levels[q] − zero[n, k // group_size])

which covers every format we read without loss:

==================  ======================  =========================
format              ``levels``              ``zeros``
==================  ======================  =========================
GPTQ asym, AWQ      0, 1, …, 15             per group, real numbers
GPTQ sym            −8, −7, …, 7            absent
NF4, FP4            the 16-entry codebook   absent; scale is absmax
==================  ======================  =========================

Stored column ``k`` multiplies input feature ``perm[k]``: act-order checkpoints (GPTQ's ``g_idx``)
are stored with their columns sorted by group, so groups are always contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INTEGER_LEVELS = torch.arange(16, dtype=torch.float32)
SYMMETRIC_LEVELS = INTEGER_LEVELS - 8

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8 codes ``(rows, columns)`` into uint8 ``(rows, ceil(columns / 2))``.

    The even column is the low nibble; an odd last column leaves its high nibble zero.
    """
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Invert :func:`pack_nibbles`: uint8 ``(rows, columns)`` with values 0–15."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return codes.flatten(1)[:, :columns]


@dataclass(frozen=True)
class PackedWeight:
    """An immutable 4-bit weight matrix of logical shape ``(out_features, in_features)``.

    qweight: uint8 ``(out_features, ceil(in_features / 2))``, see :func:`pack_nibbles`.
    scales: float16, bfloat16 or float32 ``(out_features, groups)``.
    zeros: ``(out_features, groups)`` in the dtype of ``scales``, or None where every zero is 0.
    levels: float32 ``(16,)``, the value of each code before zero and scale.
    perm: int32 ``(in_features,)``, the input feature of each stored column, or None for identity.
    bias: ``(out_features,)`` or None.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    levels: Tensor
    in_features: int
    group_size: int
    perm: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        def check(name: str, found: object, expected: object) -> None:
            if found != expected:
                raise ValueError(f"packed weight: {name} is {found}, expected {expected}")

        if self.in_features < 1 or self.group_size < 1:
            raise ValueError(
                f"packed weight: in_features {self.in_features} and group_size {self.group_size} "
                "must be positive"
            )
        out, groups = self.out_features, self.groups
        check("qweight dtype", self.qweight.dtype, torch.uint8)
        check("qweight shape", tuple(self.qweight.shape), (out, (self.in_features + 1) // 2))
        if self.scales.dtype not in _SCALE_DTYPES:
            raise ValueError(f"packed weight: scales dtype {self.scales.dtype} is not floating")
        check("scales shape", tuple(self.scales.shape), (out, groups))
        check("levels shape", tuple(self.levels.shape), (16,))
        if self.zeros is not None:
            check("zeros shape", tuple(self.zeros.shape), (out, groups))
            check("zeros dtype", self.zeros.dtype, self.scales.dtype)
        if self.perm is not None:
            check("perm shape", tuple(self.perm.shape), (self.in_features,))
        if self.bias is not None:
            check("bias shape", tuple(self.bias.shape), (out,))

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def groups(self) -> int:
        """Groups in a row; the last one is short where group_size does not divide in_features."""
        return -(-self.in_features // self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the weight."""
        tensors = (self.qweight, self.scales, self.zeros, self.levels, self.perm, self.bias)
        return sum(t.nbytes for t in tensors if t is not None)

    def codes(self) -> Tensor:
        """The 4-bit codes, uint8 ``(out_features, in_features)``, in stored column order."""
        return unpack_nibbles(self.qweight, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``(out_features, in_features)`` in input order: the format's definition.

        The product is taken in float32 and rounded once to ``dtype``. With float16 scales the
        float32 product is exact, so float16 output equals GPTQ's and AWQ's own.
        """
        columns = torch.arange(self.in_features, device=self.qweight.device) // self.group_size
        weight = self.levels[self.codes().int()]
        if self.zeros is not None:
            weight -= self.zeros.float()[:, columns]
        weight *= self.scales.float()[:, columns]
        if self.perm is not None:
            restored = torch.empty_like(weight)
            restored[:, self.perm.long()] = weight
            weight = restored
        return weight.to(dtype)
