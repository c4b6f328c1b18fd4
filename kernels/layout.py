"""How a packed weight's codes, scales and zeros lie in memory for each back end.

``rows``
    The portable layout: qweight uint8 ``(out, ceil(in / 2))``, scales and zeros ``(out, groups)``.

``cpu_tiles``
    For AVX-512: tiles of 16 outputs by 8 columns, one 64-byte vector each. qweight is uint8
    ``(ceil(out / 16), ceil(in / 8), 64)``: 32-bit lane ``i`` of a tile holds columns k…k+7 of its
    output ``i``, column ``k + 2s`` in bits 4s and column ``k + 2s + 1`` in bits 16 + 4s, so that a
    shift by 4s brings two neighbouring columns to the low bits of the lane's two halves, which is
    the pair a bf16 dot-product instruction wants. Scales and zeros are
    ``(ceil(out / 16), groups, 16)``. Padding has code 0, scale 0 and zero 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Layout = Literal["rows", "cpu_tiles"]

TILE_OUT = 16
TILE_IN = 8
# The columns in the order of their nibbles within a lane, lowest first.
_NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Arrays = tuple[Tensor, Tensor, Tensor | None]


def padded_shape(
    layout: Layout, out_features: int, in_features: int, groups: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of qweight and of scales (and zeros) in ``layout``."""
    if layout == "rows":
        return (out_features, -(-in_features // 2)), (out_features, groups)
    tiles = -(-out_features // TILE_OUT)
    return (tiles, -(-in_features // TILE_IN), 64), (tiles, groups, TILE_OUT)


def from_rows(layout: Layout, qweight: Tensor, scales: Tensor, zeros: Tensor | None) -> Arrays:
    """Re-lay ``rows`` arrays as ``layout``."""
    if layout == "rows":
        return qweight, scales, zeros
    out = qweight.shape[0]
    extra_out = -out % TILE_OUT
    extra_bytes = -qweight.shape[1] % (TILE_IN // 2)
    bytes_ = pad(qweight, (0, extra_bytes, 0, extra_out))
    codes = torch.stack((bytes_ & 0xF, bytes_ >> 4), dim=-1)
    codes = codes.view(-1, TILE_OUT, bytes_.shape[1] * 2 // TILE_IN, TILE_IN)
    codes = codes[..., list(_NIBBLE_ORDER)].transpose(1, 2)
    lanes = codes[..., 0::2] | (codes[..., 1::2] << 4)

    def tile(values: Tensor) -> Tensor:
        padded = pad(values, (0, 0, 0, extra_out))
        return padded.view(-1, TILE_OUT, values.shape[1]).transpose(1, 2).contiguous()

    return lanes.flatten(2).contiguous(), tile(scales), None if zeros is None else tile(zeros)


def to_rows(
    layout: Layout,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    in_features: int,
    groups: int,
) -> Arrays:
    """Invert :func:`from_rows` exactly."""
    if layout == "rows":
        return qweight, scales, zeros
    lanes = qweight.view(qweight.shape[0], qweight.shape[1], TILE_OUT, TILE_IN // 2)
    nibbles = torch.stack((lanes & 0xF, lanes >> 4), dim=-1).flatten(3)
    inverse = [_NIBBLE_ORDER.index(column) for column in range(TILE_IN)]
    codes = nibbles[..., inverse].transpose(1, 2).flatten(2).flatten(0, 1)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)

    def untile(values: Tensor) -> Tensor:
        return values.transpose(1, 2).reshape(-1, groups)[:out_features].contiguous()

    return (
        packed[:out_features, : -(-in_features // 2)].contiguous(),
        untile(scales),
        None if zeros is None else untile(zeros),
    )
