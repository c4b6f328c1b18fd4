"""How a packed weight's codes, scales and zeros lie in memory for each back end.

``rows``
    The portable layout: qweight uint8 ``(out, ceil(in / 2))``, scales and zeros ``(out, groups)``.

``cpu_tiles``
    For AVX-512 and AVX2: tiles of 16 outputs by 8 columns, one 64-byte vector each. qweight is
    uint8 ``(ceil(out / 16), ceil(in / 8), 64)``: 32-bit lane ``i`` of a tile holds columns k…k+7 of
    its output ``i``, column ``k + 2s`` in bits 4s and column ``k + 2s + 1`` in bits 16 + 4s. A
    shift by 4s then brings two neighbouring columns to the low bits of the lane's two halves: the
    pair a dot-product instruction of 16-bit numbers takes. Scales and zeros are
    ``(ceil(out / 16), groups, 16)``.
    Padding has code 0, scale 0 and zero 0.

``gpu_tiles``
    For tensor cores: tiles of 64 outputs by 128 columns, 4 KiB each, read in one contiguous piece.
    qweight is uint8 ``(ceil(out / 64), ceil(in / 128), 64, 64)``. Each row of a tile is 32 16-bit
    words. Its columns are four slices of 32, one for each nibble of a word, so that unpacking a
    word gives one element of each of four matrix operands (drawn in kernels/README.md). If the
    codes are plain integers, nibble ``s`` of word ``j`` is column ``32s + j``. For a codebook, two
    neighbouring words make 32 bits whose byte ``s`` is columns ``32s + j`` (low nibble) and ``32s +
    j + 1``, the order a byte-permute lookup takes. If codes are floats themselves (e2m1), the bits
    of those columns lie where a rotation of the 32 brings them to their places in two 16-bit
    floats. Scales and zeros are ``(ceil(out / 64), groups, 64)``. Padding has code 0, scale 0 and
    zero 0.

``gpu_gated_tiles``
    ``gpu_tiles`` of a fused gate_up_proj: eight outputs of gate, then the same eight of up, and so
    on. A tile then holds both, and the lane that computes a gate output also computes the up output
    which it multiplies. The outputs must be a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Layout = Literal["rows", "cpu_tiles", "gpu_tiles", "gpu_gated_tiles"]
# What codes are, by which they are ordered in ``gpu_tiles``: plain integers, places in a codebook,
# or 4-bit floats.
CodeKind = Literal["integer", "codebook", "e2m1"]

TILE_OUT = 16
TILE_IN = 8
# The columns in the order of their nibbles within a lane, lowest first.
_NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# Of an e2m1 code: some of its bits, where the lowest of them is in bfloat16 (a float's exponent has
# its lowest bits there, and its mantissa the highest), and for the four slices, how far the 32 bits
# are rotated to the left to bring them there. No other code's bits are then in the same place.
E2M1_PLACES = ((8, 15, (0, 4, 10, 6)), (4, 8, (0, 4, 10, 14)), (3, 6, (0, 4, 10, 6)))

GPU_TILE_OUT = 64
GPU_TILE_IN = 128

Arrays = tuple[Tensor, Tensor, Tensor | None]


def tile_rows(layout: Layout) -> int:
    """Outputs in a tile: a weight can be cut between outputs at multiples of this."""
    return {"rows": 1, "cpu_tiles": TILE_OUT}.get(layout, GPU_TILE_OUT)


def padded_shape(
    layout: Layout, out_features: int, in_features: int, groups: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of qweight and of scales (and zeros) in ``layout``."""
    if layout == "rows":
        return (out_features, -(-in_features // 2)), (out_features, groups)
    rows = tile_rows(layout)
    tiles = -(-out_features // rows)
    if layout == "cpu_tiles":
        return (tiles, -(-in_features // TILE_IN), 64), (tiles, groups, rows)
    codes = (tiles, -(-in_features // GPU_TILE_IN), rows, GPU_TILE_IN // 2)
    return codes, (tiles, groups, rows)


def from_rows(
    layout: Layout, qweight: Tensor, scales: Tensor, zeros: Tensor | None, kind: CodeKind
) -> Arrays:
    """Convert ``rows`` arrays of such codes to ``layout``."""
    if layout == "rows":
        return qweight, scales, zeros
    if layout == "gpu_gated_tiles":
        if qweight.shape[0] % 16:
            raise ValueError(f"{layout}: {qweight.shape[0]} outputs are not a multiple of 16")
        qweight, scales = _interleave(qweight), _interleave(scales)
        zeros = None if zeros is None else _interleave(zeros)
    rows = tile_rows(layout)
    extra_out = -qweight.shape[0] % rows
    columns = TILE_IN if layout == "cpu_tiles" else GPU_TILE_IN
    extra_bytes = -qweight.shape[1] % (columns // 2)
    bytes_ = pad(qweight, (0, extra_bytes, 0, extra_out))
    codes = torch.stack((bytes_ & 0xF, bytes_ >> 4), dim=-1).view(-1, rows, bytes_.shape[1] * 2)
    tiled = _to_cpu_tiles(codes) if layout == "cpu_tiles" else _to_gpu_tiles(codes, kind)

    def tile(values: Tensor) -> Tensor:
        padded = pad(values, (0, 0, 0, extra_out))
        return padded.view(-1, rows, values.shape[1]).transpose(1, 2).contiguous()

    return tiled, tile(scales), None if zeros is None else tile(zeros)


def to_rows(
    layout: Layout,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    in_features: int,
    groups: int,
    kind: CodeKind,
) -> Arrays:
    """Invert :func:`from_rows` exactly."""
    if layout == "rows":
        return qweight, scales, zeros
    codes = _from_cpu_tiles(qweight) if layout == "cpu_tiles" else _from_gpu_tiles(qweight, kind)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)

    def ordered(values: Tensor) -> Tensor:
        values = values[:out_features]
        return _separate(values) if layout == "gpu_gated_tiles" else values.contiguous()

    def untile(values: Tensor) -> Tensor:
        return ordered(values.transpose(1, 2).reshape(-1, groups))

    return (
        ordered(packed[:, : -(-in_features // 2)]),
        untile(scales),
        None if zeros is None else untile(zeros),
    )


def _interleave(rows: Tensor) -> Tensor:
    """Eight rows of the first half, eight of the second, and so on."""
    return rows.view(2, -1, 8, rows.shape[1]).transpose(0, 1).flatten(0, 2)


def _separate(rows: Tensor) -> Tensor:
    """Invert :func:`_interleave`."""
    return rows.reshape(-1, 2, 8, rows.shape[1]).transpose(0, 1).flatten(0, 2)


def _to_cpu_tiles(codes: Tensor) -> Tensor:
    """``(tiles, 16, columns)`` codes to ``(tiles, columns / 8, 64)`` bytes."""
    codes = codes.view(-1, TILE_OUT, codes.shape[2] // TILE_IN, TILE_IN)
    codes = codes[..., list(_NIBBLE_ORDER)].transpose(1, 2)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).flatten(2).contiguous()


def _from_cpu_tiles(qweight: Tensor) -> Tensor:
    lanes = qweight.view(qweight.shape[0], qweight.shape[1], TILE_OUT, TILE_IN // 2)
    nibbles = torch.stack((lanes & 0xF, lanes >> 4), dim=-1).flatten(3)
    inverse = [_NIBBLE_ORDER.index(column) for column in range(TILE_IN)]
    return nibbles[..., inverse].transpose(1, 2).flatten(2).flatten(0, 1)


def _to_gpu_tiles(codes: Tensor, kind: CodeKind) -> Tensor:
    """``(tiles, 64, columns)`` codes to ``(tiles, columns / 128, 64, 64)`` bytes."""
    tiles, rows, columns = codes.shape
    # The last three are the slice, the pair of words, and the word within the pair.
    split = codes.view(tiles, rows, columns // GPU_TILE_IN, 4, 16, 2).transpose(1, 2)
    if kind == "e2m1":
        words = torch.zeros((*split.shape[:3], 16), dtype=torch.int32, device=codes.device)
        for slice_, word, bits, lowest, place in _e2m1_bits():
            part = split[:, :, :, slice_, :, word].int() & bits
            words |= (part >> lowest) << place
        return words.view(torch.uint8)
    # Words of four slices, or pairs of four slices of two columns.
    order = (0, 1, 2, 4, 5, 3) if kind == "integer" else (0, 1, 2, 4, 3, 5)
    flat = split.permute(order).flatten(3)
    return (flat[..., 0::2] | (flat[..., 1::2] << 4)).contiguous()


def _from_gpu_tiles(qweight: Tensor, kind: CodeKind) -> Tensor:
    tiles, steps, rows, _ = qweight.shape
    if kind == "e2m1":
        words = qweight.contiguous().view(torch.int32)
        split = qweight.new_zeros(tiles, steps, rows, 4, 16, 2)
        for slice_, word, bits, lowest, place in _e2m1_bits():
            part = (words >> place) & (bits >> lowest)
            split[:, :, :, slice_, :, word] |= (part << lowest).to(torch.uint8)
        return split.transpose(1, 2).reshape(tiles * rows, steps * GPU_TILE_IN)
    nibbles = torch.stack((qweight & 0xF, qweight >> 4), dim=-1)
    if kind == "integer":
        split = nibbles.view(tiles, steps, rows, 16, 2, 4).permute(0, 1, 2, 5, 3, 4)
    else:
        split = nibbles.view(tiles, steps, rows, 16, 4, 2).permute(0, 1, 2, 4, 3, 5)
    return split.transpose(1, 2).reshape(tiles * rows, steps * GPU_TILE_IN)


def _e2m1_bits() -> Iterator[tuple[int, int, int, int, int]]:
    """For each slice and word of a pair, and each of a code's parts: which bits of the code it is,
    the lowest of them, and its place in the 32 bits of the pair."""
    for bits, place, rotations in E2M1_PLACES:
        lowest = (bits & -bits).bit_length() - 1
        for slice_, rotation in enumerate(rotations):
            for word in (0, 1):
                yield slice_, word, bits, lowest, (place + 16 * word - rotation) % 32
