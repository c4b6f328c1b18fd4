"""Weights of 4-bit floats with small scales: MXFP4 and NVFP4.

A code is e2m1: a sign, two bits of exponent and one of mantissa. MXFP4 (OCP Microscaling 1.0) has
one e8m0 scale, the exponent of a power of two, for 32 weights; gpt-oss's experts are stored so, and
it stays a byte. NVFP4 has one e4m3 scale for 16 weights and one float32 scale for the matrix. Two
codes lie in a byte, the first in the low half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.packed import E2M1_LEVELS, scale_values


@dataclass(frozen=True)
class MicroscaledWeight:
    """w[n, k] = E2M1_LEVELS[code] · scales[n, k / group].

    pairs: uint8 ``(out, in / 2)``, the first code in the low half of a byte.
    scales: ``(out, in / group)``, as a :class:`PackedWeight` has them.
    """

    pairs: Tensor
    scales: Tensor
    bias: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 ``(out, in)``: the format's definition."""
        codes = torch.stack((self.pairs & 0xF, self.pairs >> 4), dim=-1).flatten(1)
        group = codes.shape[1] // self.scales.shape[1]
        return E2M1_LEVELS[codes.int()] * scale_values(self.scales).repeat_interleave(group, dim=1)

    def packed(self) -> PackedWeight:
        """The same weight in the form that kernels read. Raises ValueError for part of a group."""
        out, columns = len(self.pairs), 2 * self.pairs.shape[1]
        if self.scales.shape[0] != out or columns % max(self.scales.shape[1], 1):
            raise ValueError(f"{out}×{columns} codes have scales {tuple(self.scales.shape)}")
        if not scale_values(self.scales).isfinite().all():
            raise ValueError("a scale is not finite")
        return PackedWeight(
            qweight=self.pairs.contiguous(),
            scales=self.scales.contiguous(),
            zeros=None,
            levels=E2M1_LEVELS,
            out_features=out,
            in_features=columns,
            group_size=columns // self.scales.shape[1],
            bias=self.bias,
        )


def mxfp4(pairs: Tensor, exponents: Tensor, bias: Tensor | None = None) -> MicroscaledWeight:
    """MXFP4: uint8 ``(out, in / 2)`` codes and uint8 ``(out, in / 32)`` exponents.

    gpt-oss stores an expert's codes as ``(out, in / 32, 16)``: flatten the last two dimensions.
    """
    return MicroscaledWeight(pairs, exponents, bias)


def nvfp4(
    pairs: Tensor, scales: Tensor, global_scale: Tensor, bias: Tensor | None = None
) -> MicroscaledWeight:
    """NVFP4: uint8 ``(out, in / 2)`` codes, float8_e4m3fn ``(out, in / 16)`` scales.

    global_scale: float32, one value, by which scales are divided.
    """
    return MicroscaledWeight(pairs, scales.float() / global_scale.float(), bias)
