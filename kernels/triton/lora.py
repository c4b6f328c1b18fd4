"""LoRA additions for rows of many adapters and ranks: one launch to shrink, one to expand.

A program takes rows that share an adapter (up to 16, or 32 if there are many), so every
adapter's matrices are read once for them, at the addresses in the slots' table; padded ranks are
masked and never read. The inner dimension of the shrink is cut at fixed places, and the expand adds
the pieces in order, so that a row's result does not depend on the other rows. After Punica's SGMV
(Chen et al. 2023) and S-LoRA (Sheng et al. 2023).

A program finds its rows among the few segments of a step's rows, which the host has sorted. Rows
that were routed to experts are sorted on the device, once for all launches of a layer
(:mod:`nybble.kernels.triton.routed_blocks`).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.lora import ALIGNMENT as _ALIGNMENT
from nybble.kernels.lora import GroupedLoRA, LoRASlots
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.overlap import follow, overlap_options
from nybble.kernels.triton.routed_blocks import Blocks

ALIGNMENT = tl.constexpr(_ALIGNMENT)
SHRINK_CHUNK = 1024  # inner columns of one program
SHRINK_TILE = 128
EXPAND_TILE = 128
MAX_PARTS = 3
ROWS = 16  # of a tile


@triton.jit
def _rows_of_tile(tile, starts, slots, ends, segments, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """The slot of a tile (−1 past the last), its places in ``order`` and which of them exist.

    starts, slots: of each segment; or, if there are ``ends`` of each slot, of each tile.
    """
    if ends is None:
        each = tl.arange(0, SEGMENTS)
        known = each < segments
        begins = tl.load(starts + each, known, 0)
        lengths = tl.load(starts + each + 1, known, 0) - begins
        tiles = (lengths + ROWS - 1) // ROWS
        segment = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
        slot = tl.load(slots + segment, segment < segments, -1)
        first = tl.sum(tl.where(each == segment, begins, 0), 0)
        end = first + tl.sum(tl.where(each == segment, lengths, 0), 0)
        first += (tile - tl.sum(tl.where(each < segment, tiles, 0), 0)) * ROWS
    else:
        slot = tl.load(slots + tile)
        first = tl.load(starts + tile)
        end = tl.load(ends + slot, slot >= 0, 0)
    place = first + tl.arange(0, ROWS)
    return slot, place, place < end


@triton.jit
def _matrix(address, DTYPE: tl.constexpr):
    """A matrix of which the table has the address; see kernels/lora.py."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit(do_not_specialize=["segments", "places", "plane"])
def shrink_kernel(
    x,
    table,
    order,
    starts,
    slots,
    ends,
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
    SHARED: tl.constexpr,  # places that read one row of x
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    slot, place, exists = _rows_of_tile(
        tl.program_id(0), starts, slots, ends, segments, ROWS, SEGMENTS
    )
    part = tl.program_id(1)
    chunk = tl.program_id(2)
    if slot >= 0:
        entry = table + slot * PARTS + part
        rank = tl.load(entry + 2 * plane).to(tl.int32)
        if rank > 0:
            a = _matrix(entry, x.dtype.element_ty)
            token = tl.load(order + place, exists, 0).to(tl.int64) // SHARED
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
    starts,
    slots,
    ends,
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
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    slot, place, exists = _rows_of_tile(
        tl.program_id(0), starts, slots, ends, segments, ROWS, SEGMENTS
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
    segments, places = batch.segment_slots.shape[0], batch.order.shape[0]
    # Taller tiles read an adapter less often if a prompt has many rows. A decode step has few rows
    # for each adapter, and a captured step does not know how many.
    rows = 32 if batch.max_segment > 16 and places > 256 else ROWS
    tiles = min(places, places // rows + segments)
    found = (batch.order, batch.segment_starts, batch.segment_slots, None)
    _add(out, x, slots, found, segments, tiles, rows)


def grouped_lora(slots: Tensor, count: int) -> GroupedLoRA | None:
    """See :func:`nybble.kernels.reference.grouped_lora`. Does not wait for the device.

    None only if there are no rows. Rows are read by tiles of 16, as many as any routing needs.
    """
    if not slots.numel():
        return None
    blocks = Blocks.of(torch.where(slots < 0, count, slots), count, ROWS)
    return partial(_add_routed, blocks=blocks)


def _add_routed(out: Tensor, x: Tensor, slots: LoRASlots, *, blocks: Blocks) -> None:
    rows, top_k, width = out.shape
    found = (blocks.order, blocks.first_of, blocks.expert_of, blocks.end_of)
    shared = top_k if x.ndim == 2 else 1
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) * shared != rows * top_k:
        raise ValueError(f"x is {tuple(x.shape)}, expected ({rows}, …) or ({rows}, {top_k}, …)")
    _add(out.view(-1, width), flat, slots, found, 0, len(blocks.expert_of), ROWS, shared)


def _add(
    out: Tensor,
    x: Tensor,
    slots: LoRASlots,
    found: tuple[Tensor, Tensor, Tensor, Tensor | None],
    segments: int,
    tiles: int,
    rows: int,
    shared: int = 1,
) -> None:
    """Launch both kernels.

    found: ``order``, ``starts``, ``slots`` and ``ends``, by which tiles of so many rows find them.
    shared: rows of ``out`` that use one row of ``x``.
    """
    parts, offsets = slots.parts, slots.offsets
    width, max_rank = slots.inputs, slots.max_rank
    if parts > MAX_PARTS:
        raise ValueError(f"{parts} fused parts, expected at most {MAX_PARTS}")
    if not x.dtype == out.dtype == slots.dtype or x.shape[1] != width:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and out {out.dtype}, expected {slots.dtype} "
            f"(tokens, {width})"
        )
    places = len(found[0])
    chunks = triton.cdiv(width, SHRINK_CHUNK)
    partial_sums = torch.empty(
        chunks, places, parts * max_rank, dtype=torch.float32, device=x.device
    )
    sizes = {
        "PARTS": parts,
        "MAX_RANK": max_rank,
        "RANK_PADDED": max(16, triton.next_power_of_2(max_rank)),
        "ROWS": rows,
        "SEGMENTS": max(16, triton.next_power_of_2(segments)),
        "num_warps": 4,
        **overlap_options(x.device),
    }
    shrink_kernel[(tiles, parts, chunks)](
        x,
        slots.table,
        *found,
        partial_sums,
        segments,
        places,
        slots.table.stride(0),
        width,
        **sizes,
        SHARED=shared,
        CHUNK=SHRINK_CHUNK,
        TILE=SHRINK_TILE,
        **FUSED,
    )
    inner = (*offsets[1:-1], 0, 0)
    widest = max(end - start for start, end in pairwise(offsets))
    expand_kernel[(tiles, triton.cdiv(widest, EXPAND_TILE), parts)](
        partial_sums,
        slots.table,
        out,
        *found,
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
