"""NF4 and FP4 with and without double quantization, bit for bit as bitsandbytes computes them.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"; the tables and the order of
operations are bitsandbytes'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

QuantType = Literal["nf4", "fp4"]

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
_PLACES = 65535

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
    """absmax ≈ levels[codes] · absmax[block of 256] + offset.

    codes uint8 ``(blocks,)``, absmax float32 ``(ceil(blocks / 256),)``, levels float32 ``(256,)``.
    """

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    offset: float

    def dequantize(self) -> Tensor:
        """float32 ``(blocks,)``."""
        outer = self.absmax.repeat_interleave(NESTED_BLOCKSIZE)[: len(self.codes)]
        return self.levels[self.codes.int()] * outer + self.offset


@dataclass(frozen=True)
class CodebookWeight:
    """The flattened weight in blocks: w = levels[code] · absmax of its block.

    codes uint8 ``(blocks, 64)``; absmax float32 ``(blocks,)``, quantized in turn or not.
    """

    codes: Tensor
    absmax: Tensor | NestedAbsmax
    quant_type: QuantType
    shape: tuple[int, int]
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """float32 ``(out, in)``."""
        absmax = self.absmax
        if isinstance(absmax, NestedAbsmax):
            absmax = absmax.dequantize()
        return (LEVELS[self.quant_type][self.codes.int()] * absmax[:, None]).view(self.shape)


def quantize_codebook(
    weight: Tensor, quant_type: QuantType, *, double_quant: bool = False
) -> CodebookWeight:
    """Round ``weight (out, in)`` to the nearest levels.

    Raises ValueError where blocks of 64 do not divide the number of elements.
    """
    if weight.numel() % BLOCKSIZE:
        raise ValueError(f"{weight.numel()} elements are not a multiple of blocks of {BLOCKSIZE}")
    blocks = weight.reshape(-1, BLOCKSIZE).float()
    absmax = blocks.abs().amax(-1)
    # Multiplied by the reciprocal, as there: division would round otherwise.
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    codes = _nearest(scaled, LEVELS[quant_type])
    shape = (weight.shape[0], weight.shape[1])
    nested = quantize_absmax(absmax) if double_quant else absmax
    return CodebookWeight(codes, nested, quant_type, shape, weight.dtype)


def quantize_absmax(absmax: Tensor) -> NestedAbsmax:
    """The second quantization: 8 bits in blocks of 256 around the mean."""
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_BLOCKSIZE))
    blocks = padded.view(-1, NESTED_BLOCKSIZE)
    outer = blocks.abs().amax(-1)
    levels = dynamic_map()
    scaled = blocks * (1.0 / outer.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    # As on the CPU there: looked up in a table of 2¹⁶ places between −1 and 1, which moves values
    # that lie almost half-way between two levels.
    places = ((scaled.clamp(-1, 1) + 1) * 0.5 * _PLACES + 0.5).floor()
    codes = _nearest(places / _PLACES * 2 - 1, levels)
    codes[outer == 0] = 0
    return NestedAbsmax(codes.flatten()[: len(centred)], outer, levels, float(offset))


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic data type (Dettmers 2015), float32 ``(256,)`` in rising order.

    The exponent is coded by leading zeros, from 10⁻⁶ to 10⁰; the bits left are a linear fraction.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10.0 ** (exponent - 6) * ((boundaries[:-1] + boundaries[1:]) / 2.0)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """uint8 codes of the nearest levels; the lower one where a value lies half-way."""
    order = levels.argsort()
    midpoints = (levels[order[:-1]] + levels[order[1:]]) / 2
    return order[torch.bucketize(values, midpoints, out_int32=True)].to(torch.uint8)
