"""Attention of sequences with one new token, or few: split-KV decode.

The (sequence, KV head, split) items of all sequences are distributed over a fixed number of
programs; see :mod:`nybble.kernels.triton.attention_splits`. Sequences with few new tokens, those of
a draft or a short turn, are computed as those with one, by a variant that masks keys which a token
does not see. Each variant finds its own in the batch.

A KV head's query heads times the tokens are padded to 16 rows, the minimum of a tensor-core
product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.triton.attention_splits import (
    SHORT,
    Parts,
    Splitting,
    splits_of,
    visible_keys,
)
from nybble.kernels.triton.device import FUSED, device_traits, through_registers
from nybble.kernels.triton.online_softmax import LOG2_E, attend, padded_seqs, power_scale
from nybble.kernels.triton.opaque import opaque_zero
from nybble.kernels.triton.overlap import follow, overlap_options

DECODE_TILE = 64  # keys per step of the inner loop; half if more would overfill the registers
# The block table is loaded ahead of what it points to, so five stages keep two tiles of keys and
# values in flight: 64 KiB a program for 16-bit heads of 128 or 256.
DECODE_STAGES = 5
PROGRAMS_PER_SM = 3  # that fit on an H100 by registers and shared memory; 2 of wide heads


@triton.jit
def _place_of(row, head, length, GROUP: tl.constexpr, TOKENS: tl.constexpr):
    """The new token and the query head of a program's row, and whether there is one."""
    if TOKENS == 1:
        local, q_head, valid = 0, head * GROUP + row, row < GROUP
    else:
        local, q_head = row // GROUP, head * GROUP + row % GROUP
        valid = local < length
    return local, q_head, valid


@triton.jit(do_not_specialize=["seqs", "window"])
def decode_kernel(
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
    FEWEST: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
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
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    each = tl.arange(0, SEQS_PADDED)
    known = each < seqs
    lengths = tl.load(query_start + each + 1, known, 0) - tl.load(query_start + each, known, 0)
    contexts = tl.load(context_lens + each, known, 0)
    counts = splits_of(lengths, contexts, window, SHORT, MIN_SPLIT, MAX_SPLITS, PIECE, PIECES)
    splits = tl.where((lengths >= FEWEST) & (lengths <= TOKENS), counts, 0)
    borders = tl.cumsum(splits, 0)
    items = tl.sum(splits, 0) * kv_heads

    lane = tl.arange(0, DIM_PADDED)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        head = item % kv_heads
        rank = item // kv_heads
        seq = tl.sum((borders <= rank).to(tl.int32), 0)
        split = rank - tl.sum(tl.where(each < seq, splits, 0), 0)
        count = tl.sum(tl.where(each == seq, counts, 0), 0)
        begin = tl.load(query_start + seq)
        length = tl.load(query_start + seq + 1) - begin
        context = tl.load(context_lens + seq)
        visible = visible_keys(length, context, window)
        # Whole tiles, so that only the last one of a sequence is masked.
        keys = tl.cdiv(tl.cdiv(visible, count), TILE) * TILE
        key_begin = context - visible + split * keys
        key_end = tl.minimum(key_begin + keys, context)

        row = tl.arange(0, ROWS)
        local, q_head, valid = _place_of(row, head, length, GROUP, TOKENS)
        own = q + begin.to(tl.int64) * q_stride
        at = local * q_stride + q_head * DIM
        mask = valid[:, None] & (lane < DIM)[None, :]
        query = tl.load(own + at[:, None] + lane[None, :], mask, 0.0)
        accumulators = (tl.zeros([ROWS, DIM_PADDED], tl.float32),)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if HAS_SINKS:
            # The sink is one more key, counted by the first split only.
            sink = tl.load(sinks + q_head, valid, float("-inf")).to(tl.float32)
            peak = tl.where(split == 0, sink * LOG2_E, peak)
            total = tl.where(split == 0, 1.0, total)
        table = block_tables + seq.to(tl.int64) * table_stride
        position = context - length + local + tl.zeros([ROWS], tl.int32)
        for first in tl.range(key_begin, key_end, TILE, num_stages=STAGES):
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
                TOKENS > 1,
                False,
            )
        accumulator = accumulators[0]
        # Recomputed: otherwise the row mapping would stay in registers through the loop.
        row = tl.arange(0, ROWS) + (opaque_zero() if TOKENS > 1 else 0)
        local, q_head, valid = _place_of(row, head, length, GROUP, TOKENS)
        mask = valid[:, None] & (lane < DIM)[None, :]
        if count == 1:
            to = begin.to(tl.int64) * kv_heads * GROUP + (local * kv_heads * GROUP + q_head)
            result = (accumulator / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + to[:, None] * DIM + lane[None, :], result, mask)
        else:
            stored = tl.where((each < seq) & (counts > 1), lengths * counts, 0)
            before = tl.sum(stored, 0).to(tl.int64) * kv_heads * GROUP
            to = before + (local * kv_heads * GROUP + q_head) * count + split
            tl.store(partial_out + to[:, None] * DIM + lane[None, :], accumulator, mask)
            tl.store(partial_peak + to, peak, valid)
            tl.store(partial_total + to, total, valid)


def programs_at_once(dim: int, multiprocessors: int) -> int:
    """Programs that a device with as many multiprocessors runs at once."""
    return (PROGRAMS_PER_SM if dim <= 128 else 2) * multiprocessors


def short_tokens(group: int, dim: int) -> int:
    """The most new tokens of a sequence that is decoded; 1 if a program has no rows for two."""
    return max(1, min(SHORT, (64 if dim <= 128 else 32) // group))


def max_splits(kv_heads: int, resident: int) -> int:
    """Splits of a long context: one sequence alone keeps every program busy.

    Depends on the model and the device, never on the batch.
    """
    return max(8, min(64, resident // kv_heads))


def decode(
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
    *,
    short: bool,
) -> None:
    """Attention of the sequences with one new token; if ``short``, of those with a few."""
    q_heads, dim = q.shape[1:]
    seqs, kv_heads = batch.context_lens.shape[0], k_cache.shape[1]
    _, multiprocessors, capability = device_traits(q.device)
    resident = programs_at_once(dim, multiprocessors)
    constants = decode_constants(
        q_heads // kv_heads,
        dim,
        k_cache.shape[2],
        capability,
        quantized=scales is not None,
        short=short,
    )
    decode_kernel[(min(resident, seqs * kv_heads * splitting.max_splits),)](
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
        maxnreg=max_registers(constants, capability),
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        SEQS_PADDED=padded_seqs(seqs),
        **overlap_options(q.device),
        **FUSED,
    )


def decode_constants(
    group: int, dim: int, block_size: int, capability: int, *, quantized: bool, short: bool
) -> dict[str, int]:
    """Compile-time constants and launch options of ``decode_kernel``; capability: 90 for 9.0."""
    padded = int(triton.next_power_of_2(dim))
    tokens = short_tokens(group, dim) if short else 1
    rows = max(16, int(triton.next_power_of_2(group * tokens)))
    wide = padded > 128
    tile = DECODE_TILE // 2 if wide else DECODE_TILE
    crowded = rows == 64 and (quantized or through_registers(capability))
    if short and (quantized if wide else crowded):
        tile //= 2  # or registers would be spilled
    return {
        "GROUP": group,
        "FEWEST": 2 if short else 1,
        "TOKENS": tokens,
        "ROWS": rows,
        "DIM": dim,
        "DIM_PADDED": padded,
        "BLOCK_SIZE": block_size,
        "TILE": tile,
        "QUANTIZED": quantized,
        "STAGES": DECODE_STAGES,
        "num_warps": 4,
    }


def max_registers(constants: dict[str, int], capability: int) -> int | None:
    """How many registers a thread may take; None leaves it to the compiler.

    Of wide heads and of many rows two programs fit on a multiprocessor, and of 8-bit caches too
    where there is less shared memory than Hopper's. ptxas would spill some registers to fit three,
    unless it is told that all may be used.
    """
    small = constants["QUANTIZED"] and through_registers(capability)
    return 255 if small or constants["DIM_PADDED"] > 128 or constants["ROWS"] > 32 else None
