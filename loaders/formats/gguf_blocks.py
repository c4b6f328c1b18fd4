"""The quantized blocks of GGUF files, in the form that kernels read.

A matrix's rows are stored one after another, each as blocks of 32 or 256 weights. Scales (d) and
minima (m) of a block, or of its groups of 16 or 32 weights, stand beside the codes; those of the
K types are products of a float16 and a small integer. Layouts and formulas are those of ggml
(``ggml-quants.c``), and ``gguf.dequantize`` computes the same.

===========================  ==========================  =============================
types                        a weight                    in the packed form
===========================  ==========================  =============================
Q4_0, Q3_K                   d · (q − offset)            exact, 4 bits
IQ4_NL, IQ4_XS, MXFP4        d · level[q]                exact, 4 bits
Q5_0, Q6_K, Q8_0             d · (q − offset)            exact, two 4-bit digits
Q4_1, Q4_K, Q2_K             d · q + m                   d · (q − zero), 4 bits
Q5_1, Q5_K                   d · q + m                   d · (q − zero), two digits
===========================  ==========================  =============================

The zeros −m / d of the last two rows are rounded to float32, so that a weight differs from
``d · q + m`` by float32's rounding. Everything else is equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.packed import (
    E2M1_LEVELS,
    INTEGER_LEVELS,
    SYMMETRIC_LEVELS,
    e8m0,
    pack_int8,
    pack_nibbles,
    stack_outputs,
)
from nybble.loaders.formats.affine import two_digits

_ROWS_AT_A_TIME = 2048  # unpacking needs a few times the memory of the rows that it is done with
_IQ4 = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    dtype=torch.float32,
)


@dataclass(frozen=True)
class Grid:
    """Codes of some blocks and what they stand for.

    codes: ``(blocks, weights)``, uint8, or int16 if they are of more than 4 bits.
    scales: ``(blocks, groups)``, floating, or uint8 if they are exponents.
    minima: float32 ``(blocks, groups)``, added to scale · code; None for none.
    levels: float32 ``(16,)`` of a code of 4 bits; None if a code is a number. Without minima a
        number of 4 bits is 8 less than its code.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None
    levels: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """A type of quantized block.

    weights, nbytes: of a block.
    group: weights that share a scale.
    wide: whether a code has more than 4 bits, and becomes two digits.
    minima: whether a scale has a minimum beside it.
    scale_dtype: of a scale in the packed form, which holds it exactly.
    """

    weights: int
    nbytes: int
    group: int
    unpack: Callable[[Tensor], Grid]
    wide: bool = False
    minima: bool = False
    scale_dtype: torch.dtype = torch.float32

    @property
    def is_rounded(self) -> bool:
        """Whether zeros are rounded; Q8_0's are whole numbers."""
        return self.minima and self.scale_dtype == torch.float32

    def packed(self, rows: Tensor) -> PackedWeight:
        """The matrix of uint8 ``(out, bytes)`` rows. Raises ValueError for part of a block."""
        if not rows.shape[1] or rows.shape[1] % self.nbytes:
            raise ValueError(
                f"a row has {rows.shape[1]} bytes, which are not blocks of {self.nbytes}"
            )
        parts = [self._packed(part) for part in torch.split(rows, _ROWS_AT_A_TIME)]
        whole = parts[0] if len(parts) == 1 else stack_outputs(parts)
        assert whole is not None, "all parts have the same levels and groups"
        return whole

    def _packed(self, rows: Tensor) -> PackedWeight:
        out, columns = len(rows), rows.shape[1] // self.nbytes * self.weights
        grid = self.unpack(rows.reshape(-1, self.nbytes))
        scales = grid.scales.to(self.scale_dtype)
        values = e8m0(scales) if scales.dtype == torch.uint8 else scales
        if not (values * (16 if self.wide else 1)).isfinite().all():
            raise ValueError("a scale is not finite, or too large for two digits (above 4,094)")
        codes, scales = grid.codes.reshape(out, columns), grid.scales.reshape(out, -1)
        zeros = perm = None
        if grid.minima is not None:
            codes, scales, zeros = _with_zeros(codes, scales, grid.minima.reshape(out, -1))
            if self.wide:
                codes, scales, zeros, perm = two_digits(codes, scales, zeros)
            zeros = zeros.to(self.scale_dtype)
        scales = scales.to(self.scale_dtype)
        if self.wide and zeros is None:
            return pack_int8(codes, scales, self.group)
        levels = grid.levels
        if levels is None:
            levels = SYMMETRIC_LEVELS if zeros is None else INTEGER_LEVELS
        return PackedWeight(
            qweight=pack_nibbles(codes),
            scales=scales.contiguous(),
            zeros=zeros,
            levels=levels,
            out_features=out,
            in_features=columns,
            group_size=self.group,
            perm=perm,
        )

    def packed_bytes(self, out: int, row_bytes: int) -> float:
        """Bytes of :meth:`packed`, without levels."""
        columns = row_bytes // self.nbytes * self.weights
        digits = 2 if self.wide else 1
        scales = self.scale_dtype.itemsize * (2 if self.minima else 1) / self.group
        return out * columns * digits * (1 / 2 + scales) + (8 * columns if self.wide else 0)


def _with_zeros(codes: Tensor, scales: Tensor, minima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``s · q + m`` as ``s · (q − z)``. If s is 0, as ``m · (0 − −1)``."""
    flat = scales == 0
    size = codes.shape[1] // scales.shape[1]
    codes = codes.to(torch.uint8).masked_fill(flat.repeat_interleave(size, dim=1), 0)
    zeros = torch.where(flat, -1.0, -minima / scales)
    return codes, torch.where(flat, minima, scales), zeros


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, ``(blocks, 1)`` in float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(octets: Tensor, bits: int, size: int) -> Tensor:
    """The fields of ``bits`` bits in ``size`` bytes at a time: all lowest ones, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    each: Tensor = octets.reshape(len(octets), -1, 1, size) >> shifts[:, None] & 2**bits - 1
    return each.flatten(1)


def _high_bits(octets: Tensor) -> Tensor:
    """The bits of each byte in turn, lowest first."""
    bits: Tensor = octets[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1)


def _q4_0(blocks: Tensor) -> Grid:
    return Grid(_fields(blocks[:, 2:], 4, 16), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Grid:
    return Grid(_fields(blocks[:, 4:], 4, 16), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Grid:
    codes = _fields(blocks[:, 6:], 4, 16) | _high_bits(blocks[:, 2:6]) << 4
    return Grid(codes.short() - 16, _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Grid:
    codes = _fields(blocks[:, 8:], 4, 16) | _high_bits(blocks[:, 4:8]) << 4
    return Grid(codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Grid:
    # −128 to 127 would not fit into digits without zeros, so the minimum is −128 d, exactly.
    scales = _half(blocks, 0)
    return Grid(blocks[:, 2:] ^ 0x80, scales, -128 * scales)


def _q2_k(blocks: Tensor) -> Grid:
    scales = blocks[:, :16]
    return Grid(
        _fields(blocks[:, 16:80], 2, 32),
        _half(blocks, 80) * (scales & 0xF),
        -_half(blocks, 82) * (scales >> 4),
    )


def _q3_k(blocks: Tensor) -> Grid:
    low = _fields(blocks[:, 32:96], 2, 32)
    high = _fields(blocks[:, :32], 1, 32)
    scales = _fields(blocks[:, 96:104], 4, 8) | _fields(blocks[:, 104:108], 2, 4) << 4
    # The value is low − 4 without the high bit, low with it; the levels begin at −8.
    return Grid(low + 4 + 4 * high, _half(blocks, 108) * (scales.float() - 32))


def _scales_and_minima(octets: Tensor) -> tuple[Tensor, Tensor]:
    """Eight of each in 6 bits, from 12 bytes."""
    first, second, both = torch.split(octets, 4, dim=1)
    scales = torch.cat((first & 0x3F, both & 0xF | first >> 2 & 0x30), dim=1)
    minima = torch.cat((second & 0x3F, both >> 4 | second >> 2 & 0x30), dim=1)
    return scales, minima


def _q4_k(blocks: Tensor) -> Grid:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    codes = _fields(blocks[:, 16:], 4, 32)
    return Grid(codes, _half(blocks, 0) * scales, -_half(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Grid:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    codes = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4
    return Grid(codes, _half(blocks, 0) * scales, -_half(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Grid:
    codes = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return Grid(codes.short() - 32, _half(blocks, 208) * scales)


def _iq4_nl(blocks: Tensor) -> Grid:
    return Grid(_fields(blocks[:, 2:], 4, 16), _half(blocks, 0), levels=_IQ4)


def _iq4_xs(blocks: Tensor) -> Grid:
    low = (blocks[:, 4:8, None] >> torch.tensor([0, 4], dtype=torch.uint8) & 0xF).flatten(1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    high = (blocks[:, 2:4, None] >> shifts & 3).flatten(1)
    scales = (low | high << 4).float() - 32
    return Grid(_fields(blocks[:, 8:], 4, 16), _half(blocks, 0) * scales, levels=_IQ4)


def _mxfp4(blocks: Tensor) -> Grid:
    return Grid(_fields(blocks[:, 1:], 4, 16), blocks[:, :1], levels=E2M1_LEVELS)


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 32, _q4_0, scale_dtype=torch.float16),
    "Q4_1": BlockType(32, 20, 32, _q4_1, minima=True),
    "Q5_0": BlockType(32, 22, 32, _q5_0, wide=True, scale_dtype=torch.float16),
    "Q5_1": BlockType(32, 24, 32, _q5_1, wide=True, minima=True),
    "Q8_0": BlockType(32, 34, 32, _q8_0, wide=True, minima=True, scale_dtype=torch.float16),
    "Q2_K": BlockType(256, 84, 16, _q2_k, minima=True),
    "Q3_K": BlockType(256, 110, 16, _q3_k),
    "Q4_K": BlockType(256, 144, 32, _q4_k, minima=True),
    "Q5_K": BlockType(256, 176, 32, _q5_k, wide=True, minima=True),
    "Q6_K": BlockType(256, 210, 16, _q6_k, wide=True),
    "IQ4_NL": BlockType(32, 18, 32, _iq4_nl, scale_dtype=torch.float16),
    "IQ4_XS": BlockType(256, 136, 32, _iq4_xs),
    "MXFP4": BlockType(32, 17, 32, _mxfp4, scale_dtype=torch.uint8),
}
