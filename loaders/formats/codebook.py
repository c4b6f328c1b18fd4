"""Weights on the levels of a codebook, as bitsandbytes stores them: NF4 and FP4.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"; the tables are
bitsandbytes'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.packed import pack_nibbles

QuantType = Literal["nf4", "fp4"]

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
_SMALLEST_GROUP = 16

# Normal quantiles in asymmetric halves with an exact zero.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# A sign, two bits of exponent and one of mantissa; by code, not by value.
_FP4_HALF = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

LEVELS: dict[QuantType, Tensor] = {
    "nf4": torch.tensor(_NF4),
    "fp4": torch.tensor([*_FP4_HALF, *(-level for level in _FP4_HALF)]) / 12.0,
}


@dataclass(frozen=True)
class NestedAbsmax:
    """absmax ≈ levels[codes] · absmax[block of ``blocksize``] + offset.

    codes: uint8 ``(blocks,)``.
    absmax: float32 ``(ceil(blocks / blocksize),)``.
    levels: float32 ``(256,)``.
    """

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    offset: float
    blocksize: int = NESTED_BLOCKSIZE

    def dequantize(self) -> Tensor:
        """float32 ``(blocks,)``, as bitsandbytes computes it."""
        blocks = torch.arange(len(self.codes)) // self.blocksize
        outer = self.absmax[blocks]
        return self.levels[self.codes.int()] * outer + self.offset


@dataclass(frozen=True)
class CodebookWeight:
    """The matrix, row after row, in blocks: w = levels[code] · absmax of its block.

    codes: uint8 ``(out, in)``.
    absmax: float32 ``(blocks,)``, or itself quantized (double quantization).
    dtype: of the weight before it was quantized.
    levels: float32 ``(16,)`` by code.
    """

    codes: Tensor
    absmax: Tensor | NestedAbsmax
    quant_type: QuantType
    dtype: torch.dtype
    levels: Tensor
    blocksize: int = BLOCKSIZE
    bias: Tensor | None = None

    def scales(self) -> Tensor:
        """absmax as float32 ``(blocks,)``."""
        return self.absmax.dequantize() if isinstance(self.absmax, NestedAbsmax) else self.absmax

    def dequantize(self) -> Tensor:
        """float32 ``(out, in)``."""
        each = self.scales().repeat_interleave(self.blocksize)[: self.codes.numel()]
        return self.levels[self.codes.int()] * each.view(self.codes.shape)

    def groups(self) -> tuple[int, Tensor]:
        """The group size and float32 scales ``(out, groups)``.

        Blocks may cross row ends. A group never does, and lies within one block. Raises ValueError
        if that would need groups below 16.
        """
        out, columns = self.codes.shape
        size = math.gcd(columns, self.blocksize)
        if size < min(_SMALLEST_GROUP, self.blocksize):
            raise ValueError(
                f"{columns} inputs and blocks of {self.blocksize} would need groups of "
                f"{size}; the smallest supported is {_SMALLEST_GROUP}"
            )
        block = torch.arange(out * columns // size) * size // self.blocksize
        return size, self.scales()[block].view(out, columns // size)

    def packed(self) -> PackedWeight:
        """The same weight in the form that kernels read.

        Raises ValueError as :meth:`groups`, and for scales that are not those of its blocks.
        """
        self._check()
        out, columns = self.codes.shape
        size, scales = self.groups()
        return PackedWeight(
            qweight=pack_nibbles(self.codes),
            scales=scales,
            zeros=None,
            levels=self.levels,
            out_features=out,
            in_features=columns,
            group_size=size,
            bias=self.bias,
        )

    def _check(self) -> None:
        blocks = -(-self.codes.numel() // self.blocksize)
        if isinstance(self.absmax, NestedAbsmax):
            _require("absmax", self.absmax.codes, blocks)
            _require("nested_absmax", self.absmax.absmax, -(-blocks // self.absmax.blocksize))
        else:
            _require("absmax", self.absmax, blocks)


def _require(name: str, found: Tensor, size: int) -> None:
    if found.shape != (size,):
        raise ValueError(f"{name} has the shape {tuple(found.shape)}, expected ({size},)")
