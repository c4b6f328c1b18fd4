"""The affine grid: a scale and a zero per group of inputs, integer codes from 0 on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)  # bits of a code that the GPTQ layout has; AWQ has 4 only


@dataclass(frozen=True)
class AffineWeight:
    """w[n, k] ≈ scales[n, g] · (codes[n, k] − zeros[n, g]) with g = g_idx[k].

    codes uint8 ``(out, in)`` of ``bits`` bits, scales float16 and zeros uint8 ``(out, groups)``,
    g_idx int64 ``(in,)``.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int = 4

    def dequantize(self) -> Tensor:
        """float32 ``(out, in)``."""
        centred = self.codes.float() - self.zeros.float()[:, self.g_idx]
        return centred * self.scales.float()[:, self.g_idx]

    def rows(self, start: int, stop: int) -> AffineWeight:
        """Outputs ``start``…``stop``−1."""
        part = slice(start, stop)
        return AffineWeight(
            self.codes[part], self.scales[part], self.zeros[part], self.g_idx, self.bits
        )


def grid(low: Tensor, high: Tensor, *, sym: bool, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Scale float16 and zero uint8 that span ``low``…``high`` (elementwise) and hold 0 exactly."""
    high, low = high.clamp(min=0), low.clamp(max=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    # Rounded first, so that codes are nearest for the scale that is stored; a group of zeros, or
    # one whose scale float16 cannot hold, gets the smallest scale it can.
    scales = ((high - low) / (2**bits - 1)).half().clamp(min=torch.finfo(torch.float16).tiny)
    if sym:
        return scales, torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
    return scales, (-low / scales.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)


def round_trip(grouped: Tensor, *, sym: bool) -> Tensor:
    """``grouped (…, group_size)`` float32, each group as its own grid's nearest values."""
    scales, zeros = grid(grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True), sym=sym)
    codes = nearest_codes(grouped, scales, zeros)
    return codes.sub_(zeros.float()).mul_(scales.float())


def nearest_codes(values: Tensor, scales: Tensor, zeros: Tensor, *, bits: int = 4) -> Tensor:
    """The nearest codes, as floats; the arguments broadcast."""
    return ((values / scales.float()).round_() + zeros.float()).clamp_(0, 2**bits - 1)
