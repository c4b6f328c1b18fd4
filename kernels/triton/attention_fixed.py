"""Attention in one order of sums, whatever else is in the step and however a prompt is cut.

The fast kernels read a prompt in other tiles than a single token, and a token's keys with or
without masks depending on what else its chunk holds. Here one kernel computes every token. Keys are
cut into spans at fixed positions: each span is summed by itself with the online softmax, and a
token's spans are merged in order. With few tokens each span has a program, and a second kernel
merges; with many, a program computes the spans of its tokens in turn and merges them itself. Both
are the same operations.

A token's result is not changed by tiles and spans of which it sees nothing, though others in its
block do: their weights are 0, and what was summed before is multiplied by 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.reference import check_sinks
from nybble.kernels.triton.attention_prefill import prefill_constants
from nybble.kernels.triton.device import FUSED, device_traits
from nybble.kernels.triton.online_softmax import LOG2_E, attend, padded_seqs, power_scale

# Keys of the first eight spans; the next eight have twice as many, and so on, so that a long
# context has few spans and its last one is at most an eighth of it.
FIRST_SPAN = tl.constexpr(512)
_MOST_SPANS = tl.constexpr(128)
# What the sums of spans may take before they are merged.
WORKSPACE = 128 << 20


@triton.jit
def span_begin(span):
    """The first key of a span."""
    return ((span % 8 + 8) * FIRST_SPAN << span // 8) - 8 * FIRST_SPAN


@triton.jit
def spans_of(key_begin, key_end):
    """The first span with a key in ``key_begin`` … ``key_end − 1``, and the one after the last."""
    each = tl.arange(0, _MOST_SPANS)
    before = tl.sum((span_begin(each + 1) <= key_begin).to(tl.int32), 0)
    return before, tl.sum((span_begin(each) < key_end).to(tl.int32), 0)


@triton.jit
def merged(sums, peak, total, more, more_peak, more_total):
    """Two sums of the online softmax as one; ``sums`` and ``more`` are tuples ``(rows, …)``.

    Which product is fused with which addition is said, so that every kernel rounds alike.
    """
    new_peak = tl.maximum(peak, more_peak)
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink, more_shrink = tl.exp2(peak - base), tl.exp2(more_peak - base)
    both = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(sums)):
        both += (tl.fma(more[part], more_shrink[:, None], sums[part] * shrink[:, None]),)
    return both, new_peak, tl.fma(more_total, more_shrink, total * shrink)


@triton.jit(do_not_specialize=["seqs", "window"])
def spans_kernel(
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
    span_out,  # float32 (tokens, heads, spans, dim), if each span has a program
    span_peak,
    span_total,
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
    PARTS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SEQS_PADDED: tl.constexpr,
    STAGES: tl.constexpr,
):
    each = tl.arange(0, SEQS_PADDED)
    known = each < seqs
    lengths = tl.load(query_start + each + 1, known, 0) - tl.load(query_start + each, known, 0)
    pieces = (lengths + TOKENS - 1) // TOKENS
    piece = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.sum((tl.cumsum(pieces, 0) <= piece).to(tl.int32), 0)
    if seq >= seqs:
        return
    context = tl.load(context_lens + seq)
    if context == 0:
        return
    offset = (piece - tl.sum(tl.where(each < seq, pieces, 0), 0)) * TOKENS
    begin = tl.load(query_start + seq)
    length = tl.load(query_start + seq + 1) - begin
    key_end = tl.minimum(context - length + offset + TOKENS, context)
    key_begin = tl.where(window > 0, tl.maximum(context - length + offset - window + 1, 0), 0)
    first_span, last_span = spans_of(key_begin, key_end)
    apart = tl.num_programs(2) > 1
    if apart:
        span = tl.program_id(2)
        if (span < first_span) | (span >= last_span):
            return
        first_span, last_span = span, span + 1

    row = tl.arange(0, ROWS)
    lane = tl.arange(0, DIM_PADDED)
    local = offset + row // GROUP
    q_head = head * GROUP + row % GROUP
    valid = (row // GROUP < TOKENS) & (local < length)
    mask = valid[:, None] & (lane < DIM)[None, :]
    token = (begin + local).to(tl.int64)
    query = tl.load(
        q + token[:, None] * q_stride + q_head[:, None] * DIM + lane[None, :], mask, 0.0
    )
    position = context - length + local
    table = block_tables + seq.to(tl.int64) * table_stride
    PART: tl.constexpr = DIM_PADDED // PARTS
    sums = ()  # type: tuple[object, ...]
    for _ in tl.static_range(PARTS):
        sums += (tl.zeros([ROWS, PART], tl.float32),)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:  # the sink counts as a key before all others
        sink = tl.load(sinks + q_head).to(tl.float32) * LOG2_E
        peak = tl.where(apart, peak, sink)
        total = tl.where(apart, total, 1.0)
    for span in range(first_span, last_span):
        span_sums = ()  # type: tuple[object, ...]
        for _ in tl.static_range(PARTS):
            span_sums += (tl.zeros([ROWS, PART], tl.float32),)
        own_peak = tl.full([ROWS], float("-inf"), tl.float32)
        own_total = tl.zeros([ROWS], tl.float32)
        start = tl.maximum(span_begin(span), key_begin // TILE * TILE)
        stop = tl.minimum(span_begin(span + 1), key_end)
        for first in tl.range(start, stop, TILE, num_stages=STAGES):
            span_sums, own_peak, own_total = attend(
                query,
                span_sums,
                own_peak,
                own_total,
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
        sums, peak, total = merged(sums, peak, total, span_sums, own_peak, own_total)

    to = (begin + local).to(tl.int64) * kv_heads * GROUP + q_head
    if apart:
        to = to * tl.num_programs(2) + first_span
        tl.store(span_peak + to, peak, valid)
        tl.store(span_total + to, total, valid)
        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            at = to[:, None] * DIM + column[None, :]
            tl.store(span_out + at, sums[part], valid[:, None] & (column < DIM)[None, :])
    else:
        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            result = (sums[part] / total[:, None]).to(out.dtype.element_ty)
            at = to[:, None] * DIM + column[None, :]
            tl.store(out + at, result, valid[:, None] & (column < DIM)[None, :])


@triton.jit(do_not_specialize=["seqs", "window"])
def merge_kernel(
    query_start,
    context_lens,
    sinks,
    out,
    span_out,
    span_peak,
    span_total,
    seqs,
    spans,
    window,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SEQS_PADDED: tl.constexpr,
):
    token = tl.program_id(0)
    q_head = tl.program_id(1)
    each = tl.arange(0, SEQS_PADDED)
    ends = tl.load(query_start + each + 1, each < seqs, token + 1)
    seq = tl.sum((ends <= token).to(tl.int32), 0)
    context = tl.load(context_lens + seq, seq < seqs, 0)  # a row that pads a step is of none
    if context == 0:
        return
    key_end = context - tl.load(query_start + seq + 1) + token + 1
    key_begin = tl.where(window > 0, tl.maximum(key_end - window, 0), 0)
    first_span, last_span = spans_of(key_begin, key_end)
    one = tl.arange(0, 1)
    lane = tl.arange(0, DIM_PADDED)
    inside = (lane < DIM)[None, :]
    to = token.to(tl.int64) * tl.num_programs(1) + q_head + one
    sums = (tl.zeros([1, DIM_PADDED], tl.float32),)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if HAS_SINKS:
        peak = tl.load(sinks + q_head + one).to(tl.float32) * LOG2_E
        total = tl.full([1], 1.0, tl.float32)
    for span in range(first_span, last_span):
        at = to * spans + span
        more = tl.load(span_out + at[:, None] * DIM + lane[None, :], inside, 0.0)
        more_peak, more_total = tl.load(span_peak + at), tl.load(span_total + at)
        sums, peak, total = merged(sums, peak, total, (more,), more_peak, more_total)
    result = (sums[0] / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + to[:, None] * DIM + lane[None, :], result, inside)


def spans_in(keys: int) -> int:
    """How many spans ``keys`` keys are cut into."""
    first: int = FIRST_SPAN.value
    doubled = max(0, ((keys - 1) // first + 8).bit_length() - 4)
    return 8 * doubled + -(-(keys + 8 * first) // (first << doubled)) - 8


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """See :func:`nybble.kernels.reference.paged_attention`. Heads of a row must be contiguous."""
    tokens, q_heads, dim = q.shape
    if sinks is not None:
        check_sinks(sinks, q_heads)
    out = torch.empty(tokens, q_heads * dim, dtype=q.dtype, device=q.device)
    seqs, kv_heads = batch.context_lens.shape[0], k_cache.shape[1]
    scales = None if k_scales is None or v_scales is None else (k_scales, v_scales)
    _, multiprocessors, capability = device_traits(q.device)
    constants = fixed_constants(
        q_heads // kv_heads, dim, k_cache.shape[2], capability, quantized=scales is not None
    )
    # Each sequence may have one partly filled piece.
    pieces = min(tokens, tokens // constants["TOKENS"] + seqs)
    spans = spans_in(batch.block_tables.shape[1] * k_cache.shape[2])
    each = tokens * q_heads * spans
    # Programs that compute spans in turn suffice if there are many of them.
    apart = pieces * kv_heads < 2 * multiprocessors and 4 * each * (dim + 2) <= WORKSPACE
    size = each if apart else 1
    workspace = q.new_empty(size * (dim + 2), dtype=torch.float32)
    span_out, span_peak, span_total = workspace.split([size * dim, size, size])
    given_sinks = q if sinks is None else sinks  # never read if there are none
    sizes = {"HAS_SINKS": sinks is not None, "SEQS_PADDED": padded_seqs(seqs)}
    spans_kernel[(pieces, kv_heads, spans if apart else 1)](
        q,
        k_cache,
        v_cache,
        *(scales or (k_cache, v_cache)),  # likewise
        given_sinks,
        batch.query_start,
        batch.context_lens,
        batch.block_tables,
        out,
        span_out,
        span_peak,
        span_total,
        seqs,
        batch.block_tables.stride(0),
        q.stride(0),
        kv_heads,
        power_scale(scale, softcap),
        window,
        **constants,
        SOFTCAP=softcap,
        **sizes,
        **FUSED,
    )
    if apart and spans > 1:
        merge_kernel[(tokens, q_heads)](
            batch.query_start,
            batch.context_lens,
            given_sinks,
            out,
            span_out,
            span_peak,
            span_total,
            seqs,
            spans,
            window,
            DIM=dim,
            DIM_PADDED=triton.next_power_of_2(dim),
            **sizes,
            num_warps=1,
            **FUSED,
        )
    return out


def fixed_constants(
    group: int, dim: int, block_size: int, capability: int, *, quantized: bool
) -> dict[str, int]:
    """Compile-time constants of ``spans_kernel``; capability: 90 for 9.0."""
    constants = prefill_constants(group, dim, block_size, capability, quantized=quantized)
    del constants["ANEW"]
    # Two sums are kept, of a span and of those before. Half the rows leave registers for both.
    rows = constants["ROWS"] if dim <= 64 else max(64, int(triton.next_power_of_2(group)))
    return constants | {"ROWS": rows, "TOKENS": rows // group}
