"""NF4 and FP4 with and without double quantization, bit for bit as bitsandbytes computes them.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"; the order of operations is
bitsandbytes'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.loaders.formats.codebook import (
    BLOCKSIZE,
    LEVELS,
    NESTED_BLOCKSIZE,
    CodebookWeight,
    NestedAbsmax,
    QuantType,
)

_PLACES = 65535
_BLOCKS_AT_A_TIME = 1 << 12


def quantize_codebook(
    weight: Tensor,
    quant_type: QuantType,
    *,
    double_quant: bool = False,
    blocksize: int = BLOCKSIZE,
) -> CodebookWeight:
    """Round ``weight (out, in)`` to the nearest levels.

    Raises ValueError if blocks do not divide the number of elements.
    """
    if weight.numel() % blocksize:
        raise ValueError(f"{weight.numel()} elements are not a multiple of blocks of {blocksize}")
    levels = LEVELS[quant_type]
    blocks = weight.reshape(-1, blocksize)
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(len(blocks), dtype=torch.float32, device=weight.device)
    # In parts: what is computed on the way takes ten times as much memory as 16-bit weights.
    for start in range(0, len(blocks), _BLOCKS_AT_A_TIME):
        part = slice(start, start + _BLOCKS_AT_A_TIME)
        wide = blocks[part].float()
        absmax[part] = wide.abs().amax(-1)
        # Multiplied by the reciprocal as in bitsandbytes: division would round differently.
        scaled = (wide * (1.0 / absmax[part].clamp(min=1e-38))[:, None]).clamp(-1, 1)
        codes[part] = _nearest(scaled, levels)
    nested = quantize_absmax(absmax) if double_quant else absmax
    return CodebookWeight(
        codes.view(weight.shape), nested, quant_type, weight.dtype, levels, blocksize
    )


def quantize_absmax(absmax: Tensor) -> NestedAbsmax:
    """The second quantization: 8 bits in blocks of 256 around the mean."""
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_BLOCKSIZE))
    blocks = padded.view(-1, NESTED_BLOCKSIZE)
    outer = blocks.abs().amax(-1)
    levels = dynamic_map()
    scaled = blocks * (1.0 / outer.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    # As bitsandbytes does on the CPU: a lookup in a table of 2¹⁶ places between −1 and 1. It may
    # pick the other level for a value almost half-way between two.
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
    """uint8 codes of the nearest levels; the lower one if a value lies half-way."""
    order = levels.argsort()
    midpoints = (levels[order[:-1]] + levels[order[1:]]) / 2
    return order[torch.bucketize(values, midpoints, out_int32=True)].to(torch.uint8)
