"""Paged attention: split-KV decode (flash-decoding) and chunked prefill, both GQA-packed.

Sequences with one new token are decoded, the others prefilled; each kernel finds its own in the
batch, so a mixed batch is two launches and a sequence takes the same path whatever shares its step.
Nothing is read back from the device, and the grids do not depend on the context lengths: a decode
launch can be captured in a CUDA graph and replayed as contexts grow.

Decode. A sequence's keys are cut into splits whose number and borders depend on its own context
length alone, so its result does not depend on the batch. The (sequence, KV head, split) items of
all sequences are dealt to a fixed number of programs. Each item leaves an unnormalised output and
its running maximum and sum, which a second kernel combines in order (Dao et al. 2023,
"Flash-Decoding for long-context inference").

Prefill. A program takes 128 rows, query heads that share a KV head times neighbouring tokens, and
walks the keys they see with the online softmax (Dao 2023, FlashAttention-2).

The query heads of a KV head are padded to 16 rows, the least a tensor-core product takes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from nybble.kernels.attention_batch import AttentionBatch
from torch import Tensor

# A split has at least this many keys: below it, the second stage costs more than it spreads.
MIN_SPLIT = 256
DECODE_TILE = 64  # keys per step of the inner loop
# The block table is loaded ahead of what it points to, so five stages keep two tiles of keys and
# values in flight: 64 KiB a program for 16-bit heads of 128.
DECODE_STAGES = 5
PREFILL_ROWS = 128
LOG2_E = 1.4426950408889634
PROGRAMS_PER_SM = 3  # that fit on an H100 by registers and shared memory


@triton.jit
def _splits(visible, MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """How many splits ``visible`` keys are cut into: 0 for none."""
    return tl.minimum((visible + MIN_SPLIT - 1) // MIN_SPLIT, MAX_SPLITS)


@triton.jit
def _visible(context, window):
    """Keys the last token sees: all, or the last ``window`` of them (0 is no window)."""
    return tl.where(window > 0, tl.minimum(context, window), context)


@triton.jit
def _attend(
    query,
    accumulator,
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
    key_end,
    position,
    scale,
    window,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One step of the online softmax: keys ``first`` … ``first + TILE − 1`` below ``key_end``.

    ``position`` is the position of each query row. ``scale`` includes log2(e): powers are of two.
    """
    key = first + tl.arange(0, TILE)
    lane = tl.arange(0, DIM_PADDED)
    inside = key < key_end
    block = tl.load(table + key // BLOCK_SIZE, inside, 0).to(tl.int64)
    row = (block * kv_heads + head) * BLOCK_SIZE + key % BLOCK_SIZE
    at = row[:, None] * DIM + lane[None, :]
    mask = inside[:, None] if DIM == DIM_PADDED else inside[:, None] & (lane < DIM)[None, :]
    keys = tl.load(k_cache + at, mask, 0.0)
    values = tl.load(v_cache + at, mask, 0.0)
    if QUANTIZED:
        keys = keys.to(query.dtype)
        values = values.to(query.dtype)
    scores = tl.dot(query, tl.trans(keys)) * scale
    if QUANTIZED:
        scores *= tl.load(k_scales + row, inside, 0.0)[None, :]
    seen = inside[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= position[:, None])
        seen = seen & ((window == 0) | (key[None, :] > position[:, None] - window))
    scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen no key yet keeps a peak of −∞; 0 in its place keeps NaN out.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = accumulator * shrink[:, None]
    if QUANTIZED:
        weights *= tl.load(v_scales + row, inside, 0.0)[None, :]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator)
    return accumulator, new_peak, total


@triton.jit(do_not_specialize=["seqs", "window"])
def decode_kernel(
    q,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
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
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SEQS_PADDED: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    each = tl.arange(0, SEQS_PADDED)
    known = each < seqs
    starts = tl.load(query_start + each, known, 0)
    ends = tl.load(query_start + each + 1, known, 0)
    visibles = _visible(tl.load(context_lens + each, known, 0), window)
    splits = tl.where(ends - starts == 1, _splits(visibles, MAX_SPLITS, MIN_SPLIT), 0)
    borders = tl.cumsum(splits, 0)
    items = tl.sum(splits, 0) * kv_heads

    member = tl.arange(0, GROUP_PADDED)
    lane = tl.arange(0, DIM_PADDED)
    mask = (member < GROUP)[:, None] & (lane < DIM)[None, :]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        head = item % kv_heads
        rank = item // kv_heads
        seq = tl.sum((borders <= rank).to(tl.int32), 0)
        split = rank - tl.sum(tl.where(each < seq, splits, 0), 0)
        context = tl.load(context_lens + seq)
        visible = _visible(context, window)
        count = _splits(visible, MAX_SPLITS, MIN_SPLIT)
        # Whole tiles, so that only the last one of a sequence is masked.
        length = tl.cdiv(tl.cdiv(visible, count), TILE) * TILE
        key_begin = context - visible + split * length
        key_end = tl.minimum(key_begin + length, context)

        token = tl.load(query_start + seq).to(tl.int64)
        q_head = head * GROUP + member
        query = tl.load(q + token * q_stride + q_head[:, None] * DIM + lane[None, :], mask, 0.0)
        accumulator = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
        peak = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PADDED], tl.float32)
        table = block_tables + seq.to(tl.int64) * table_stride
        position = context - 1 + tl.zeros([GROUP_PADDED], tl.int32)
        for first in tl.range(key_begin, key_end, TILE, num_stages=STAGES):
            accumulator, peak, total = _attend(
                query,
                accumulator,
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
                key_end,
                position,
                scale,
                window,
                DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                TILE,
                QUANTIZED,
                False,
            )
        if count == 1:
            to = (token * kv_heads * GROUP + q_head)[:, None] * DIM + lane[None, :]
            tl.store(out + to, (accumulator / total[:, None]).to(out.dtype.element_ty), mask)
        else:
            row = (seq.to(tl.int64) * kv_heads * GROUP + q_head) * MAX_SPLITS + split
            tl.store(partial_out + row[:, None] * DIM + lane[None, :], accumulator, mask)
            tl.store(partial_peak + row, peak, member < GROUP)
            tl.store(partial_total + row, total, member < GROUP)


@triton.jit(do_not_specialize=["window"])
def reduce_kernel(
    query_start,
    context_lens,
    out,
    partial_out,
    partial_peak,
    partial_total,
    q_heads,
    window,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    seq = tl.program_id(0)
    q_head = tl.program_id(1)
    token = tl.load(query_start + seq).to(tl.int64)
    is_decode = tl.load(query_start + seq + 1) - token == 1
    visible = _visible(tl.load(context_lens + seq), window)
    count = tl.where(is_decode, _splits(visible, MAX_SPLITS, MIN_SPLIT), 0)
    if count > 1:
        # Rounding splits up to whole tiles can leave the last ones without keys; they have stored
        # a peak of −∞ and weigh nothing.
        split = tl.arange(0, SPLITS_PADDED)
        lane = tl.arange(0, DIM_PADDED)
        row = (seq.to(tl.int64) * q_heads + q_head) * MAX_SPLITS + split
        peak = tl.load(partial_peak + row, split < count, float("-inf"))
        total = tl.load(partial_total + row, split < count, 0.0)
        weight = tl.exp2(peak - tl.max(peak, 0))
        part = tl.load(
            partial_out + row[:, None] * DIM + lane[None, :],
            (split < count)[:, None] & (lane < DIM)[None, :],
            0.0,
        )
        result = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
        to = (token * q_heads + q_head) * DIM + lane
        tl.store(out + to, result.to(out.dtype.element_ty), lane < DIM)


@triton.jit(do_not_specialize=["seqs", "window"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    query_start,
    context_lens,
    block_tables,
    out,
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
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SEQS_PADDED: tl.constexpr,
    STAGES: tl.constexpr,
):
    each = tl.arange(0, SEQS_PADDED)
    known = each < seqs
    lengths = tl.load(query_start + each + 1, known, 0) - tl.load(query_start + each, known, 0)
    pieces = tl.where(lengths > 1, (lengths + TOKENS - 1) // TOKENS, 0)
    piece = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.sum((tl.cumsum(pieces, 0) <= piece).to(tl.int32), 0)
    if seq < seqs:
        offset = (piece - tl.sum(tl.where(each < seq, pieces, 0), 0)) * TOKENS
        begin = tl.load(query_start + seq)
        length = tl.load(query_start + seq + 1) - begin
        context = tl.load(context_lens + seq)

        row = tl.arange(0, ROWS)
        lane = tl.arange(0, DIM_PADDED)
        local = offset + row // GROUP
        q_head = head * GROUP + row % GROUP
        mask = ((row // GROUP < TOKENS) & (local < length))[:, None] & (lane < DIM)[None, :]
        token = (begin + local).to(tl.int64)
        query = tl.load(
            q + token[:, None] * q_stride + q_head[:, None] * DIM + lane[None, :], mask, 0.0
        )
        position = context - length + local
        accumulator = tl.zeros([ROWS, DIM_PADDED], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        table = block_tables + seq.to(tl.int64) * table_stride
        key_end = tl.minimum(context - length + offset + TOKENS, context)
        key_begin = tl.where(window > 0, tl.maximum(context - length + offset - window + 1, 0), 0)
        key_begin = key_begin // TILE * TILE
        # Every row sees every key before ``open_end`` (no row sees past it without a mask).
        open_end = tl.where(window > 0, key_begin, (context - length + offset + 1) // TILE * TILE)
        for first in tl.range(key_begin, open_end, TILE, num_stages=STAGES):
            accumulator, peak, total = _attend(
                query,
                accumulator,
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
                key_end,
                position,
                scale,
                window,
                DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                TILE,
                QUANTIZED,
                False,
            )
        for first in tl.range(open_end, key_end, TILE, num_stages=STAGES):
            accumulator, peak, total = _attend(
                query,
                accumulator,
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
                key_end,
                position,
                scale,
                window,
                DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                TILE,
                QUANTIZED,
                True,
            )
        to = (token * kv_heads * GROUP + q_head)[:, None] * DIM + lane[None, :]
        # Rows past the sequence have seen keys too, and are not stored.
        tl.store(out + to, (accumulator / total[:, None]).to(out.dtype.element_ty), mask)


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, ten times the compute capability); arbitrary for the interpreter."""
    if device.type != "cuda":
        return 1, 90
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def max_splits(kv_heads: int, multiprocessors: int) -> int:
    """Splits of a long context: one sequence alone keeps every program busy.

    Depends on the model and the device, never on the batch.
    """
    return max(8, min(64, PROGRAMS_PER_SM * multiprocessors // kv_heads))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """See :func:`nybble.kernels.reference.paged_attention`. Heads of a row must be contiguous."""
    tokens, q_heads, dim = q.shape
    out = torch.empty(tokens, q_heads * dim, dtype=q.dtype, device=q.device)
    scales = None if k_scales is None or v_scales is None else (k_scales, v_scales)
    if batch.max_query > 1:
        _prefill(q, k_cache, v_cache, scales, batch, scale, window, out)
    if batch.max_query == 1 or batch.context_lens.shape[0] > 1:
        _decode(q, k_cache, v_cache, scales, batch, scale, window, out)
    return out


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    batch: AttentionBatch,
    scale: float,
    window: int,
    out: Tensor,
) -> None:
    q_heads, dim = q.shape[1:]
    seqs, kv_heads = batch.context_lens.shape[0], k_cache.shape[1]
    multiprocessors, _ = _device(q.device)
    splits = max_splits(kv_heads, multiprocessors)
    partial_out = q.new_empty((seqs, q_heads, splits, dim), dtype=torch.float32)
    partial_peak = q.new_empty((seqs, q_heads, splits), dtype=torch.float32)
    partial_total = torch.empty_like(partial_peak)
    decode_kernel[(min(PROGRAMS_PER_SM * multiprocessors, seqs * kv_heads * splits),)](
        q,
        k_cache,
        v_cache,
        *(scales or (k_cache, v_cache)),  # never read where there are none
        batch.query_start,
        batch.context_lens,
        batch.block_tables,
        out,
        partial_out,
        partial_peak,
        partial_total,
        seqs,
        batch.block_tables.stride(0),
        q.stride(0),
        kv_heads,
        scale * LOG2_E,
        window,
        **decode_constants(q_heads // kv_heads, dim, k_cache.shape[2]),
        QUANTIZED=scales is not None,
        SEQS_PADDED=_padded(seqs),
        MAX_SPLITS=splits,
    )
    reduce_kernel[(seqs, q_heads)](
        batch.query_start,
        batch.context_lens,
        out,
        partial_out,
        partial_peak,
        partial_total,
        q_heads,
        window,
        DIM=dim,
        DIM_PADDED=triton.next_power_of_2(dim),
        MAX_SPLITS=splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        MIN_SPLIT=MIN_SPLIT,
        num_warps=4,
    )


def _prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    batch: AttentionBatch,
    scale: float,
    window: int,
    out: Tensor,
) -> None:
    tokens, q_heads, dim = q.shape
    seqs, kv_heads = batch.context_lens.shape[0], k_cache.shape[1]
    constants = prefill_constants(q_heads // kv_heads, dim, k_cache.shape[2], _device(q.device)[1])
    # Each sequence may leave one piece part filled.
    pieces = tokens // constants["TOKENS"] + seqs
    prefill_kernel[(pieces, kv_heads)](
        q,
        k_cache,
        v_cache,
        *(scales or (k_cache, v_cache)),  # never read where there are none
        batch.query_start,
        batch.context_lens,
        batch.block_tables,
        out,
        seqs,
        batch.block_tables.stride(0),
        q.stride(0),
        kv_heads,
        scale * LOG2_E,
        window,
        **constants,
        QUANTIZED=scales is not None,
        SEQS_PADDED=_padded(seqs),
    )


def _padded(seqs: int) -> int:
    """Few different sizes, so that few variants are compiled."""
    return max(16, int(triton.next_power_of_2(seqs)))


def decode_constants(group: int, dim: int, block_size: int) -> dict[str, int]:
    """Compile-time constants and launch options of ``decode_kernel`` for a model's sizes."""
    padded = int(triton.next_power_of_2(dim))
    return {
        "GROUP": group,
        "GROUP_PADDED": max(16, int(triton.next_power_of_2(group))),
        "DIM": dim,
        "DIM_PADDED": padded,
        "BLOCK_SIZE": block_size,
        "TILE": DECODE_TILE,
        "MIN_SPLIT": MIN_SPLIT,
        "STAGES": DECODE_STAGES if padded <= 128 else 3,
        "num_warps": 4,
    }


def prefill_constants(group: int, dim: int, block_size: int, capability: int) -> dict[str, int]:
    """Likewise for ``prefill_kernel``, on a device of compute capability ``capability / 10``."""
    padded = int(triton.next_power_of_2(dim))
    rows = max(PREFILL_ROWS, int(triton.next_power_of_2(group)))
    return {
        "GROUP": group,
        "DIM": dim,
        "DIM_PADDED": padded,
        "BLOCK_SIZE": block_size,
        "ROWS": rows,
        "TOKENS": rows // group,
        # Before Hopper the operands of a product pass through registers, which 64 keys overfill.
        "TILE": 64 if capability >= 90 else 32,
        "STAGES": 3 if capability >= 90 else 5,
        "num_warps": 8,
    }
