"""LoRA additions for rows of many adapters and ranks: one launch to shrink, one to expand.

A program takes rows that share an adapter (up to 16, or 32 if there are many), so every
adapter's matrices are read once for them, at the addresses in the slots' table; padded ranks are
masked and never read. The inner dimension of the shrink is cut at fixed places, and the expand adds
the pieces in order, so that a row's result does not depend on the other rows. After Punica's SGMV
(Chen et al. 2023) and S-LoRA (Sheng et al. 2023).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.lora import ALIGNMENT as _ALIGNMENT
from nybble.kernels.lora import LoRASlots
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.triton.device import FUSED

ALIGNMENT = tl.constexpr(_ALIGNMENT)
SHRINK_CHUNK = 1024  # inner columns of one program
SHRINK_TILE = 128
EXPAND_TILE = 128
MAX_PARTS = 3


@triton.jit
def _rows_of_tile(
    tile, order, segment_starts, segment_slots, segments, ROWS: tl.constexpr, SEGMENTS: tl.constexpr
):
    """The slot of a tile (−1 past the last), its places in ``order`` and which of them exist."""
    each = tl.arange(0, SEGMENTS)
    known = each < segments
    starts = tl.load(segment_starts + each, known, 0)
    lengths = tl.load(segment_starts + each + 1, known, 0) - starts
    tiles = (lengths + ROWS - 1) // ROWS
    segment = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    slot = tl.load(segment_slots + segment, segment < segments, -1)
    first = tl.sum(tl.where(each == segment, starts, 0), 0)
    length = tl.sum(tl.where(each == segment, lengths, 0), 0)
    offset = (tile - tl.sum(tl.where(each < segment, tiles, 0), 0)) * ROWS
    local = offset + tl.arange(0, ROWS)
    return slot, first + local, local < length


@triton.jit
def _matrix(address, DTYPE: tl.constexpr):
    """A matrix of which the table has the address; see kernels/lora.py."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit(do_not_specialize=["segments", "places", "plane"])
def shrink_kernel(
    x,
    table,
    order,
    segment_starts,
    segment_slots,
    partial,
    segments,
    places,
    plane,
    width,
    PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    slot, place, exists = _rows_of_tile(
        tl.program_id(0), order, segment_starts, segment_slots, segments, ROWS, SEGMENTS
    )
    part = tl.program_id(1)
    chunk = tl.program_id(2)
    if slot >= 0:
        entry = table + slot * PARTS + part
        rank = tl.load(entry + 2 * plane).to(tl.int32)
        if rank > 0:
            a = _matrix(entry, x.dtype.element_ty)
            token = tl.load(order + place, exists, 0).to(tl.int64)
            r = tl.arange(0, RANK_PADDED)
            total = tl.zeros([ROWS, RANK_PADDED], tl.float32)
            end = tl.minimum(chunk * CHUNK + CHUNK, width)
            for first in tl.range(chunk * CHUNK, end, TILE, num_stages=3):
                column = first + tl.arange(0, TILE)
                inside = column < width
                rows = tl.load(
                    x + token[:, None] * width + column[None, :],
                    exists[:, None] & inside[None, :],
                    0.0,
                )
                matrix = tl.load(
                    a + r[:, None] * width + column[None, :],
                    (r < rank)[:, None] & inside[None, :],
                    0.0,
                )
                total = tl.dot(rows, tl.trans(matrix), total)
            to = ((chunk * places + place) * PARTS + part) * MAX_RANK
            tl.store(
                partial + to[:, None] + r[None, :],
                total,
                exists[:, None] & (r < rank)[None, :],
            )


@triton.jit(do_not_specialize=["segments", "places", "plane"])
def expand_kernel(
    partial,
    table,
    out,
    order,
    segment_starts,
    segment_slots,
    segments,
    places,
    plane,
    out_stride,
    begin_1,
    begin_2,
    end,
    PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    slot, place, exists = _rows_of_tile(
        tl.program_id(0), order, segment_starts, segment_slots, segments, ROWS, SEGMENTS
    )
    part = tl.program_id(2)
    begin = tl.where(part == 0, 0, tl.where(part == 1, begin_1, begin_2))
    stop = tl.where(part == PARTS - 1, end, tl.where(part == 0, begin_1, begin_2))
    local = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = begin + local
    if (slot >= 0) & (begin + tl.program_id(1) * TILE < stop):
        entry = table + slot * PARTS + part
        rank = tl.load(entry + 2 * plane).to(tl.int32)
        if rank > 0:
            b = _matrix(entry + plane, out.dtype.element_ty)
            token = tl.load(order + place, exists, 0).to(tl.int64)
            r = tl.arange(0, RANK_PADDED)
            real = exists[:, None] & (r < rank)[None, :]
            h = tl.zeros([ROWS, RANK_PADDED], tl.float32)
            for chunk in range(CHUNKS):
                at = ((chunk * places + place) * PARTS + part) * MAX_RANK
                h += tl.load(partial + at[:, None] + r[None, :], real, 0.0)
            matrix = tl.load(
                b + r[:, None] * (stop - begin) + local[None, :],
                (r < rank)[:, None] & (column < stop)[None, :],
                0.0,
            )
            at = token[:, None] * out_stride + column[None, :]
            mask = exists[:, None] & (column < stop)[None, :]
            before = tl.load(out + at, mask, 0.0)
            added = tl.dot(h.to(matrix.dtype), matrix, before.to(tl.float32))
            tl.store(out + at, added.to(before.dtype), mask)


def lora_add(out: Tensor, x: Tensor, slots: LoRASlots, batch: LoRABatch) -> None:
    """See :func:`nybble.kernels.reference.lora_add`. For 16 bits and up to three fused parts."""
    parts, offsets = slots.parts, slots.offsets
    width, max_rank = slots.inputs, slots.max_rank
    if parts > MAX_PARTS:
        raise ValueError(f"{parts} fused parts, expected at most {MAX_PARTS}")
    if not x.dtype == out.dtype == slots.dtype or x.shape[1] != width:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and out {out.dtype}, expected {slots.dtype} "
            f"(tokens, {width})"
        )
    segments, places = batch.segment_slots.shape[0], batch.order.shape[0]
    # Taller tiles read an adapter less often if a prompt has many rows. A decode step has few rows
    # for each adapter, and a captured step does not know how many.
    rows = 32 if batch.max_segment > 16 and places > 256 else 16
    tiles = min(places, places // rows + segments)
    chunks = triton.cdiv(width, SHRINK_CHUNK)
    partial = torch.empty(chunks, places, parts * max_rank, dtype=torch.float32, device=x.device)
    sizes = {
        "PARTS": parts,
        "MAX_RANK": max_rank,
        "RANK_PADDED": max(16, triton.next_power_of_2(max_rank)),
        "ROWS": rows,
        "SEGMENTS": max(16, triton.next_power_of_2(segments)),
        "num_warps": 4,
    }
    places_of = (batch.order, batch.segment_starts, batch.segment_slots)
    shrink_kernel[(tiles, parts, chunks)](
        x,
        slots.table,
        *places_of,
        partial,
        segments,
        places,
        slots.table.stride(0),
        width,
        **sizes,
        CHUNK=SHRINK_CHUNK,
        TILE=SHRINK_TILE,
        **FUSED,
    )
    inner = (*offsets[1:-1], 0, 0)
    widest = max(end - start for start, end in pairwise(offsets))
    expand_kernel[(tiles, triton.cdiv(widest, EXPAND_TILE), parts)](
        partial,
        slots.table,
        out,
        *places_of,
        segments,
        places,
        slots.table.stride(0),
        out.stride(0),
        inner[0],
        inner[1],
        offsets[-1],
        **sizes,
        CHUNKS=chunks,
        TILE=EXPAND_TILE,
        **FUSED,
    )
