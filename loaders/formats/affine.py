"""Weights on an affine grid as every format stores them: integer codes, scales and zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles

WIDTHS = (2, 3, 4, 8)  # bits of a code which the packed form can hold


@dataclass(frozen=True)
class AffineWeight:
    """w[n, k] ≈ scales[n, g] · (codes[n, k] − zeros[n, g]) with g = g_idx[k].

    codes: uint8 ``(out, in)`` of ``bits`` bits.
    scales: floating ``(out, groups)``.
    zeros: uint8 ``(out, groups)``.
    g_idx: int64 ``(in,)``, the group of each input.
    bias: ``(out,)`` or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int = 4
    bias: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 ``(out, in)``."""
        centred = self.codes.float() - self.zeros.float()[:, self.g_idx]
        return centred * self.scales.float()[:, self.g_idx]

    def rows(self, start: int, stop: int) -> AffineWeight:
        """Outputs ``start``…``stop``−1."""
        part = slice(start, stop)
        return replace(
            self,
            codes=self.codes[part],
            scales=self.scales[part],
            zeros=self.zeros[part],
            bias=None if self.bias is None else self.bias[part],
        )

    def packed(self) -> PackedWeight:
        """The same weight in the form that kernels read, columns sorted by group.

        Codes of 2 and 3 bits become 4-bit codes that leave some levels unused, those of 8 bits
        become :func:`two_digits`.

        Raises ValueError for groups of different sizes, and for an 8-bit weight with a short last
        group or with scales that float16 cannot hold 16 times.
        """
        codes, scales, zeros = self.codes, self.scales, self.zeros
        out, columns = codes.shape
        group_size = int((self.g_idx == 0).sum())
        perm = _order_by_group(self.g_idx, max(group_size, 1))
        if perm is not None:
            codes = codes[:, perm.long()]
        symmetric = self.bits <= 4 and bool((zeros == 8).all())
        if self.bits == 8:
            if columns % group_size or not (scales * 16).isfinite().all():
                raise ValueError(
                    "an 8-bit weight needs whole groups and scales below 4,096; it has "
                    f"{columns} inputs in groups of {group_size}, scales up to {scales.max()}"
                )
            codes, scales, zeros, perm = two_digits(codes, scales, zeros, perm)
        return PackedWeight(
            qweight=pack_nibbles(codes),
            scales=scales.contiguous(),
            zeros=None if symmetric else zeros.to(scales.dtype).contiguous(),
            levels=SYMMETRIC_LEVELS if symmetric else INTEGER_LEVELS,
            out_features=out,
            in_features=columns,
            group_size=group_size,
            perm=perm,
            bias=self.bias,
        )


def two_digits(
    codes: Tensor, scales: Tensor, zeros: Tensor, perm: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit codes, scales, zeros and perm as those of two 4-bit digits side by side.

    s · (q − z) = 16 s · (q₁ − z₁) + s · (q₀ − z₀), with a whole number z₁, so that each part is
    small if the sum is.

    codes: uint8 ``(out, in)``.
    scales, zeros: ``(out, groups)``; zeros may be integers or not.
    """
    columns = codes.shape[1]
    high = (zeros.float() / 16).floor()
    low = zeros.float() - 16 * high
    in_order = torch.arange(columns, dtype=torch.int32)
    return (
        torch.cat((codes >> 4, codes & 0xF), dim=1),
        torch.cat((scales * 16, scales), dim=1),
        torch.cat((high, low), dim=1).to(zeros.dtype),
        (in_order if perm is None else perm).repeat(2),
    )


@dataclass(frozen=True)
class AffineSizes:
    """Sizes of one weight, from its tensors' headers.

    scale_bytes: bytes of one scale.
    """

    out: int
    columns: int
    groups: int
    scale_bytes: int


def packed_bytes(sizes: AffineSizes, bits: int, *, zeros: bool, act_order: bool) -> int:
    """Bytes of :meth:`AffineWeight.packed`, without levels and bias.

    zeros: whether any differs from 8.
    act_order: whether columns are stored out of order.
    """
    digits = 2 if bits == 8 else 1
    codes = sizes.out * -(-sizes.columns * digits // 2)
    scales = sizes.out * sizes.groups * digits * sizes.scale_bytes
    perm = 4 * digits * sizes.columns if act_order or digits == 2 else 0
    return codes + scales * (2 if zeros or bits != 4 else 1) + perm


def consecutive_groups(columns: int, group_size: int) -> Tensor:
    """``g_idx`` of groups that are in order; group_size −1 means one group."""
    return torch.arange(columns) // (columns if group_size == -1 else group_size)


def _order_by_group(g_idx: Tensor, group_size: int) -> Tensor | None:
    """The stable order that brings each group's features together; None if they already are."""
    expected = torch.arange(len(g_idx), device=g_idx.device) // group_size
    if torch.equal(g_idx, expected):
        return None
    perm = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[perm], expected):
        raise ValueError(f"g_idx does not put {group_size} features into each group")
    return perm.int()


def words_for(bits: int) -> int:
    """The fewest codes of ``bits`` bits that fill whole int32 words."""
    return 32 // math.gcd(bits, 32)


def to_words(codes: Tensor, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """uint8 ``(rows, n)`` to words ``(rows, n · bits / 32)``, codes one after another, low first.

    dtype: of the words; the number of them is for int32. A code of 3 bits may lie across two words.
    ``n`` codes must fill whole words.
    """
    each = np.unpackbits(codes.cpu().numpy()[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(each.reshape(len(codes), -1), axis=-1, bitorder="little")
    return torch.from_numpy(packed).view(dtype)


def from_words(words: Tensor, bits: int) -> Tensor:
    """Invert :func:`to_words`: words of any dtype to uint8 ``(rows, codes)``."""
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return octets
    if bits == 4:
        return torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(1)
    each = np.unpackbits(octets.numpy(), axis=1, bitorder="little")
    each = each[:, : each.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return torch.from_numpy(np.packbits(each, axis=-1, bitorder="little")[..., 0])
