"""Round-to-nearest quantization of one weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor

# bitsandbytes' table: normal quantiles in asymmetric halves with an exact zero (QLoRA, Dettmers et
# al. 2023, as implemented there).
NF4_LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
_ROWS_AT_A_TIME = 1 << 16


def quantize_affine(weight: Tensor, group_size: int, *, sym: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``(out, in)``, scales float16 and zeros uint8 ``(out, groups)``.

    w ≈ scale · (code − zero), the zero being 8 if ``sym``. The range of a group always contains 0.
    """
    out, columns = weight.shape
    grouped = weight.float().view(out, columns // group_size, group_size)
    high, low = grouped.amax(-1).clamp(min=0), grouped.amin(-1).clamp(max=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    # Rounded first, so that codes are nearest for the scale that is stored; a group of zeros, or
    # one whose scale float16 cannot hold, gets the smallest scale it can.
    scales = ((high - low) / 15).half().clamp(min=torch.finfo(torch.float16).tiny)
    zeros = torch.full_like(low, 8) if sym else (-low / scales.float()).round().clamp(0, 15)
    codes = (grouped / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, 15).to(torch.uint8).view(out, columns), scales, zeros.to(torch.uint8)


def quantize_nf4(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``(blocks, blocksize)`` and absmax float32 ``(blocks,)`` of the flattened weight.

    Raises ValueError where ``blocksize`` does not divide the number of elements.
    """
    if weight.numel() % blocksize:
        raise ValueError(f"{weight.numel()} elements are not a multiple of blocks of {blocksize}")
    blocks = weight.float().reshape(-1, blocksize)
    absmax = blocks.abs().amax(-1)
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.empty_like(blocks, dtype=torch.uint8)
    for start in range(0, len(blocks), _ROWS_AT_A_TIME // blocksize):
        part = scaled[start : start + _ROWS_AT_A_TIME // blocksize]
        codes[start : start + len(part)] = (part[..., None] - NF4_LEVELS).abs().argmin(-1)
    return codes, absmax
