"""Attention of sequences with many new tokens: chunked prefill.

A program takes 128 rows, query heads that share a KV head times neighbouring tokens, and walks the
keys they see with the online softmax (Dao 2023, FlashAttention-2). If a sequence has too few rows
to keep the device busy, as a short turn on a long context has, several programs share the keys of
the same rows; see :mod:`nybble.kernels.triton.attention_splits`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.triton.attention_splits import Parts, Splitting, splits_of
from nybble.kernels.triton.device import FUSED, device_traits, through_registers
from nybble.kernels.triton.online_softmax import LOG2_E, attend, padded_seqs, power_scale
from nybble.kernels.triton.opaque import opaque_zero

PREFILL_ROWS = 128


@triton.jit
def _store_heads(out, row, mask, accumulators, total, DIM: tl.constexpr, PART: tl.constexpr):
    """The parts of heads at these rows, divided by ``total``."""
    for part in tl.static_range(len(accumulators)):
        lane = part * PART + tl.arange(0, PART)
        result = (accumulators[part] / total).to(out.dtype.element_ty)
        at = row[:, None] * DIM + lane[None, :]
        tl.store(out + at, result, mask[:, None] & (lane < DIM)[None, :])


@triton.jit(do_not_specialize=["seqs", "window"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    sinks,
    query_start,
    context_lens,
    block_tables,
    out,
    partial_out,
    partial_peak,
    partial_total,
    seqs,
    table_stride,
    q_stride,
    kv_heads,
    scale,
    window,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    ANEW: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SEQS_PADDED: tl.constexpr,
    SHORT: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):
    each = tl.arange(0, SEQS_PADDED)
    known = each < seqs
    lengths = tl.load(query_start + each + 1, known, 0) - tl.load(query_start + each, known, 0)
    items = tl.where(lengths > SHORT, (lengths + PIECE - 1) // PIECE, 0)
    if PIECES > 1:
        contexts = tl.load(context_lens + each, known, 0)
        counts = splits_of(lengths, contexts, window, SHORT, MIN_SPLIT, MAX_SPLITS, PIECE, PIECES)
        items *= counts
    item = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.sum((tl.cumsum(items, 0) <= item).to(tl.int32), 0)
    if seq < seqs:
        item -= tl.sum(tl.where(each < seq, items, 0), 0)
        count, split, stored = 1, 0, 0
        if PIECES > 1:
            count = tl.sum(tl.where(each == seq, counts, 0), 0)
            split = item % count
            stored = tl.sum(tl.where((each < seq) & (counts > 1), lengths * counts, 0), 0)
        offset = item // count * PIECE
        begin = tl.load(query_start + seq)
        length = tl.load(query_start + seq + 1) - begin
        context = tl.load(context_lens + seq)

        row = tl.arange(0, ROWS)
        lane = tl.arange(0, DIM_PADDED)
        local = offset + row // GROUP
        q_head = head * GROUP + row % GROUP
        mask = ((row // GROUP < PIECE) & (local < length))[:, None] & (lane < DIM)[None, :]
        token = (begin + local).to(tl.int64)
        query = tl.load(
            q + token[:, None] * q_stride + q_head[:, None] * DIM + lane[None, :], mask, 0.0
        )
        position = context - length + local
        PART: tl.constexpr = DIM_PADDED // PARTS
        accumulators = ()  # type: tuple[object, ...]
        for _ in tl.static_range(PARTS):
            accumulators += (tl.zeros([ROWS, PART], tl.float32),)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if HAS_SINKS:  # the sink counts as a key that the first split has already processed
            sink = tl.load(sinks + q_head).to(tl.float32)
            peak = tl.where(split == 0, sink * LOG2_E, peak)
            total = tl.where(split == 0, 1.0, total)
        table = block_tables + seq.to(tl.int64) * table_stride
        key_end = tl.minimum(context - length + offset + PIECE, context)
        key_begin = tl.where(window > 0, tl.maximum(context - length + offset - window + 1, 0), 0)
        tile_begin = key_begin // TILE * TILE  # whatever else the chunk holds
        keys = tl.cdiv(tl.cdiv(key_end - tile_begin, count), TILE) * TILE
        tile_begin += split * keys
        key_end = tl.minimum(tile_begin + keys, key_end)
        # Every row sees every key before ``open_end`` (no row sees past it without a mask).
        open_end = (context - length + offset + 1) // TILE * TILE
        open_end = tl.where(window > 0, tile_begin, tl.minimum(open_end, key_end))
        for first in tl.range(tile_begin, open_end, TILE, num_stages=STAGES):
            accumulators, peak, total = attend(
                query,
                accumulators,
                peak,
                total,
                k_cache,
                v_cache,
                k_scales,
                v_scales,
                table,
                head,
                kv_heads,
                first,
                key_begin,
                key_end,
                position,
                scale,
                window,
                DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                TILE,
                QUANTIZED,
                SOFTCAP,
                False,
                True,
            )
        for first in tl.range(tl.maximum(tile_begin, open_end), key_end, TILE, num_stages=STAGES):
            accumulators, peak, total = attend(
                query,
                accumulators,
                peak,
                total,
                k_cache,
                v_cache,
                k_scales,
                v_scales,
                table,
                head,
                kv_heads,
                first,
                key_begin,
                key_end,
                position,
                scale,
                window,
                DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                TILE,
                QUANTIZED,
                SOFTCAP,
                True,
                False,
            )
        # Recomputed: otherwise the row mapping would stay in registers through the loops.
        row = tl.arange(0, ROWS) + (opaque_zero() if ANEW else 0)
        local = offset + row // GROUP
        q_head = head * GROUP + row % GROUP
        # Rows past the end of the sequence were computed too, and are not stored.
        mask = (row // GROUP < PIECE) & (local < length)
        is_part = count > 1 if PIECES > 1 else False
        if is_part:
            to = tl.cast(stored, tl.int64) * kv_heads * GROUP
            to += (local * kv_heads * GROUP + q_head) * count + split
            tl.store(partial_peak + to, peak, mask)
            tl.store(partial_total + to, total, mask)
            _store_heads(partial_out, to, mask, accumulators, 1.0, DIM, PART)
        else:
            to = (begin + local).to(tl.int64) * kv_heads * GROUP + q_head
            _store_heads(out, to, mask, accumulators, total[:, None], DIM, PART)


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    batch: AttentionBatch,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    out: Tensor,
    parts: Parts,
    splitting: Splitting,
) -> None:
    """Attention of the sequences that are not decoded."""
    tokens, q_heads, dim = q.shape
    seqs, kv_heads = batch.context_lens.shape[0], k_cache.shape[1]
    constants = prefill_constants(
        q_heads // kv_heads,
        dim,
        k_cache.shape[2],
        device_traits(q.device)[2],
        quantized=scales is not None,
    )
    if batch.rows is None:
        # A sequence has as many programs as keep the device busy, or one for each of its pieces.
        programs = (
            batch.longer_than(splitting.short, tokens) * splitting.pieces
            + tokens // splitting.piece
        )
    else:
        programs = sum(map(splitting.programs, batch.rows))
    prefill_kernel[(programs, kv_heads)](
        q,
        k_cache,
        v_cache,
        *(scales or (k_cache, v_cache)),  # never read if there are none
        q if sinks is None else sinks,  # likewise
        batch.query_start,
        batch.context_lens,
        batch.block_tables,
        out,
        *parts.tensors,
        seqs,
        batch.block_tables.stride(0),
        q.stride(0),
        kv_heads,
        power_scale(scale, softcap),
        window,
        **constants,
        **splitting.constants,
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        SEQS_PADDED=padded_seqs(seqs),
        **FUSED,
    )


def prefill_rows(group: int) -> int:
    """Rows of a program: ``group`` query heads times as many tokens as fit."""
    return max(PREFILL_ROWS, int(triton.next_power_of_2(group)))


def prefill_splitting(group: int, kv_heads: int, dim: int, multiprocessors: int) -> tuple[int, int]:
    """``piece`` and ``pieces`` of :class:`Splitting`.

    Heads above 128 are not split: the registers of their programs are full.
    """
    programs = multiprocessors * (2 if dim <= 64 else 1) if dim <= 128 else 0
    return prefill_rows(group) // group, max(1, programs // kv_heads)


def prefill_constants(
    group: int, dim: int, block_size: int, capability: int, *, quantized: bool
) -> dict[str, int]:
    """Compile-time constants of ``prefill_kernel``; capability: 90 for 9.0."""
    padded = int(triton.next_power_of_2(dim))
    wide = padded > 128
    # If a product's operands pass through registers, 64 keys do not fit. For wide heads, two stages
    # of 16 keys are all that fits in 99 KiB of shared memory beside the queries.
    slow = through_registers(capability)
    tile = 32 if slow or (wide and quantized) else 64
    if slow and wide:
        tile = 16
    # Products of 128 by 256 are shared between warps by column, each of which would then read all
    # queries and weights. Hopper's are asked for by all warps together.
    whole = not wide or (capability == 90 and not quantized)
    return {
        "GROUP": group,
        "DIM": dim,
        "DIM_PADDED": padded,
        "BLOCK_SIZE": block_size,
        "ROWS": prefill_rows(group),
        "TILE": tile,
        "PARTS": 1 if whole else 2,
        # By count: there, and there alone, it takes more registers than it saves.
        "ANEW": not (slow and padded == 128),
        "QUANTIZED": quantized,
        "STAGES": 5 if slow else 3,
        "num_warps": 8,
    }
