"""The affine grid: a scale and a zero per group of inputs, integer codes from 0 on."""

from __future__ import annotations

import torch
from torch import Tensor


def grid(
    low: Tensor, high: Tensor, *, sym: bool, bits: int = 4, least_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """Scale float16 and zero uint8 that span ``low``…``high`` (elementwise) and hold 0 exactly.

    least_zero: 0 or 1. With 1, a group whose values are all positive gets a level below zero.
    """
    high, low = high.clamp(min=0), low.clamp(max=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scales, zeros = _spanning(low, high, bits)
    if least_zero and not sym:
        low = torch.where(zeros < least_zero, -high / (2**bits - 2), low)
        scales, zeros = _spanning(low, high, bits)
    if sym:
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    return scales, zeros.clamp(least_zero, 2**bits - 1).to(torch.uint8)


def _spanning(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    # Scales are rounded to float16 first, so that codes are nearest for the stored scale. A group
    # of zeros, or one whose scale underflows, gets the smallest normal float16.
    scales = ((high - low) / (2**bits - 1)).half().clamp(min=torch.finfo(torch.float16).tiny)
    return scales, (-low / scales.float()).round()


def round_trip(grouped: Tensor, *, sym: bool) -> Tensor:
    """``grouped (…, group_size)`` float32, each group rounded to its own grid."""
    scales, zeros = grid(grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True), sym=sym)
    codes = nearest_codes(grouped, scales, zeros)
    return codes.sub_(zeros.float()).mul_(scales.float())


def nearest_codes(values: Tensor, scales: Tensor, zeros: Tensor, *, bits: int = 4) -> Tensor:
    """The nearest codes, as floats; the arguments broadcast."""
    return ((values / scales.float()).round_() + zeros.float()).clamp_(0, 2**bits - 1)
