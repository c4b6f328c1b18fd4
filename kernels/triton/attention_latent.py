"""Latent attention over its compressed cache: split-KV decode and chunked prefill.

A row of the cache is one token's rotated key and its latent, of which all heads read the same. A
program takes as many heads as fit, so a row is read once for all of them, and the latents that it
has loaded as keys are its values too. Rows are query heads times neighbouring tokens.

Sequences with one new token or few are cut into splits (``attention_splits``), each token by
itself: all heads of one fill a program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.triton.attention_decode import max_splits
from nybble.kernels.triton.attention_splits import (
    SHORT,
    Parts,
    Splitting,
    batches_of,
    reduce,
    splits_of,
)
from nybble.kernels.triton.device import FUSED, device_traits
from nybble.kernels.triton.online_softmax import padded_seqs, power_scale
from nybble.kernels.triton.opaque import opaque_zero

_ROWS = 32  # the most query rows of a program
# A program of decode has a multiprocessor to itself. For 16 query rows ptxas would spill some
# registers to fit two programs, unless it is told that a thread may take all.
DECODE_REGISTERS = 255


@triton.jit
def _load_part(
    cache,
    row,
    inside,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Elements ``FIRST`` … ``FIRST + SIZE − 1`` of rows of ``WIDTH``: ``(rows, PADDED)``."""
    lane = tl.arange(0, PADDED)
    mask = inside[:, None] if SIZE == PADDED else inside[:, None] & (lane < SIZE)[None, :]
    return tl.load(cache + row[:, None] * WIDTH + FIRST + lane[None, :], mask, 0.0)


@triton.jit
def _attend(
    turned,
    query,
    accumulator,
    peak,
    total,
    cache,
    values,
    scales,
    table,
    first,
    key_end,
    position,
    scale,
    ROTATED: tl.constexpr,
    ROTATED_PADDED: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One step of the online softmax: keys ``first`` … ``first + TILE − 1`` below ``key_end``.

    turned: the rotated parts of the queries; query: those that are multiplied with latents.
    CAUSAL masks keys behind ``position``, that of each row.
    """
    key = first + tl.arange(0, TILE)
    inside = key < key_end
    block = tl.load(table + key // BLOCK_SIZE, inside, 0).to(tl.int64)
    row = block * BLOCK_SIZE + key % BLOCK_SIZE
    WIDTH: tl.constexpr = ROTATED + LATENT
    keys = _load_part(cache, row, inside, WIDTH, 0, ROTATED, ROTATED_PADDED).to(query.dtype)
    latents = _load_part(cache, row, inside, WIDTH, ROTATED, LATENT, LATENT_PADDED)
    scores = tl.dot(turned, tl.trans(keys))
    scores = tl.dot(query, tl.trans(latents.to(query.dtype)), scores) * scale
    if QUANTIZED:
        sizes = tl.load(scales + row, inside, 0.0)[None, :]
        scores *= sizes
    seen = inside[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= position[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen no key yet keeps a peak of −∞; 0 in its place keeps NaN out.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    if QUANTIZED:
        weights *= sizes
        # Products take converted entries from registers, in two orders, and what both take is not
        # copied ahead. Loads from ``values``, the same memory, are not merged with those above.
        latents = _load_part(values, row, inside, WIDTH, ROTATED, LATENT, LATENT_PADDED)
    latents = latents.to(query.dtype)
    accumulator = tl.dot(weights.to(query.dtype), latents, accumulator * shrink[:, None])
    return accumulator, new_peak, total


@triton.jit
def _load_queries(
    q,
    row,
    mask,
    ROTATED: tl.constexpr,
    ROTATED_PADDED: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_PADDED: tl.constexpr,
):
    """Their rotated parts, and those that are multiplied with latents."""
    WIDTH: tl.constexpr = ROTATED + LATENT
    turned = _load_part(q, row, mask, WIDTH, 0, ROTATED, ROTATED_PADDED)
    return turned, _load_part(q, row, mask, WIDTH, ROTATED, LATENT, LATENT_PADDED)


@triton.jit(do_not_specialize=["seqs"])
def latent_decode_kernel(
    q,
    cache,
    values,
    scales,
    query_start,
    context_lens,
    block_tables,
    out,
    partial_out,
    partial_peak,
    partial_total,
    seqs,
    table_stride,
    heads,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATED: tl.constexpr,
    ROTATED_PADDED: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
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
    contexts = tl.load(context_lens + each, known, 0)
    counts = splits_of(lengths, contexts, 0, SHORT, MIN_SPLIT, MAX_SPLITS, PIECE, PIECES)
    splits = tl.where(lengths <= SHORT, lengths * counts, 0)  # of all its tokens
    borders = tl.cumsum(splits, 0)
    groups = tl.cdiv(heads, GROUP)
    items = tl.sum(splits, 0) * groups

    member = tl.arange(0, ROWS)
    lane = tl.arange(0, LATENT_PADDED)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # Programs side by side read the same rows of the cache, if one cannot take all heads.
        head = item % groups * GROUP + member
        valid = (member < GROUP) & (head < heads)
        rank = item // groups
        seq = tl.sum((borders <= rank).to(tl.int32), 0)
        count = tl.sum(tl.where(each == seq, counts, 0), 0)
        part = rank - tl.sum(tl.where(each < seq, splits, 0), 0)
        local, split = part // count, part % count
        begin = tl.load(query_start + seq)
        context = tl.load(context_lens + seq)
        seen = context - tl.load(query_start + seq + 1) + begin + local + 1
        # Whole tiles, so that only the last one that a token sees is masked.
        keys = tl.cdiv(tl.cdiv(context, count), TILE) * TILE
        key_begin = split * keys
        key_end = tl.minimum(key_begin + keys, seen)

        token = (begin + local).to(tl.int64)
        turned, query = _load_queries(
            q, token * heads + head, valid, ROTATED, ROTATED_PADDED, LATENT, LATENT_PADDED
        )
        accumulator = tl.zeros([ROWS, LATENT_PADDED], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        table = block_tables + seq.to(tl.int64) * table_stride
        for first in tl.range(key_begin, key_end, TILE, num_stages=STAGES):
            accumulator, peak, total = _attend(
                turned,
                query,
                accumulator,
                peak,
                total,
                cache,
                values,
                scales,
                table,
                first,
                key_end,
                member,
                scale,
                ROTATED,
                ROTATED_PADDED,
                LATENT,
                LATENT_PADDED,
                BLOCK_SIZE,
                TILE,
                QUANTIZED,
                False,
            )
        mask = valid[:, None] & (lane < LATENT)[None, :]
        if count == 1:
            to = token * heads + head
            result = (accumulator / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + to[:, None] * LATENT + lane[None, :], result, mask)
        else:
            stored = tl.where((each < seq) & (counts > 1), lengths * counts, 0)
            before = tl.sum(stored, 0).to(tl.int64) * heads
            to = before + (local * heads + head) * count + split
            tl.store(partial_out + to[:, None] * LATENT + lane[None, :], accumulator, mask)
            tl.store(partial_peak + to, peak, valid)
            tl.store(partial_total + to, total, valid)


@triton.jit(do_not_specialize=["seqs"])
def latent_prefill_kernel(
    q,
    cache,
    values,
    scales,
    query_start,
    context_lens,
    block_tables,
    out,
    seqs,
    table_stride,
    heads,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATED: tl.constexpr,
    ROTATED_PADDED: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SEQS_PADDED: tl.constexpr,
    SHORT: tl.constexpr,
    STAGES: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    each = tl.arange(0, SEQS_PADDED)
    known = each < seqs
    lengths = tl.load(query_start + each + 1, known, 0) - tl.load(query_start + each, known, 0)
    pieces = tl.where(lengths > SHORT, (lengths + TOKENS - 1) // TOKENS, 0)
    groups = tl.cdiv(heads, GROUP)
    piece = tl.program_id(0) // groups
    seq = tl.sum((tl.cumsum(pieces, 0) <= piece).to(tl.int32), 0)
    if seq < seqs:
        offset = (piece - tl.sum(tl.where(each < seq, pieces, 0), 0)) * TOKENS
        begin = tl.load(query_start + seq)
        length = tl.load(query_start + seq + 1) - begin
        context = tl.load(context_lens + seq)

        row = tl.arange(0, ROWS)
        local = offset + row // GROUP
        head = tl.program_id(0) % groups * GROUP + row % GROUP
        valid = (row // GROUP < TOKENS) & (local < length) & (head < heads)
        at = (begin + local).to(tl.int64) * heads + head
        turned, query = _load_queries(q, at, valid, ROTATED, ROTATED_PADDED, LATENT, LATENT_PADDED)
        position = context - length + local
        accumulator = tl.zeros([ROWS, LATENT_PADDED], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        table = block_tables + seq.to(tl.int64) * table_stride
        key_end = tl.minimum(context - length + offset + TOKENS, context)
        for first in tl.range(0, key_end, TILE, num_stages=STAGES):
            accumulator, peak, total = _attend(
                turned,
                query,
                accumulator,
                peak,
                total,
                cache,
                values,
                scales,
                table,
                first,
                key_end,
                position,
                scale,
                ROTATED,
                ROTATED_PADDED,
                LATENT,
                LATENT_PADDED,
                BLOCK_SIZE,
                TILE,
                QUANTIZED,
                True,
            )
        # Recomputed: otherwise the row mapping would stay in registers through the loop.
        row = tl.arange(0, ROWS) + opaque_zero()
        local = offset + row // GROUP
        head = tl.program_id(0) % groups * GROUP + row % GROUP
        valid = (row // GROUP < TOKENS) & (local < length) & (head < heads)
        at = (begin + local).to(tl.int64) * heads + head
        lane = tl.arange(0, LATENT_PADDED)
        result = (accumulator / total[:, None]).to(out.dtype.element_ty)
        mask = valid[:, None] & (lane < LATENT)[None, :]
        tl.store(out + at[:, None] * LATENT + lane[None, :], result, mask)


def latent_attention(
    q: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    latent_dim: int,
    scales: Tensor | None = None,
) -> Tensor:
    """See :func:`nybble.kernels.reference.latent_attention`; queries must be contiguous."""
    tokens, heads, width = q.shape
    seqs = batch.context_lens.shape[0]
    out = q.new_empty((tokens, heads, latent_dim))
    _, multiprocessors, capability = device_traits(q.device)
    sizes = heads, width - latent_dim, latent_dim, cache.shape[2], capability
    quantized = scales is not None
    if batch.may_have(SHORT + 1):
        constants = latent_constants(*sizes, quantized=quantized, decode=False)
        groups = triton.cdiv(heads, constants["GROUP"])
        # Each sequence may have one partly filled piece.
        pieces = tokens // (constants["ROWS"] // constants["GROUP"]) + batch.longer_than(
            SHORT, tokens
        )
        latent_prefill_kernel[(pieces * groups,)](
            *_inputs(q, cache, scales, batch, out),
            *_numbers(batch, heads, scale),
            **constants,
            SHORT=SHORT,
            SEQS_PADDED=padded_seqs(seqs),
            **FUSED,
        )
    if batch.may_have(1, SHORT):
        constants = latent_constants(*sizes, quantized=quantized, decode=True)
        groups = triton.cdiv(heads, constants["GROUP"])
        # A program takes a whole multiprocessor. Long sequences are not split.
        splitting = Splitting(max_splits(groups, multiprocessors), SHORT)
        for few, parts in batches_of(batch, splitting, q, latent_dim):
            _decode(q, cache, scales, few, scale, out, constants, parts, splitting)
            reduce(few, parts, splitting, 0, out, heads)
    return out


def _inputs(
    q: Tensor, cache: Tensor, scales: Tensor | None, batch: AttentionBatch, out: Tensor
) -> tuple[Tensor, ...]:
    return (
        q,
        cache,
        cache,
        cache if scales is None else scales,  # never read if there are none
        batch.query_start,
        batch.context_lens,
        batch.block_tables,
        out,
    )


def _numbers(batch: AttentionBatch, heads: int, scale: float) -> tuple[int, int, int, float]:
    seqs, stride = batch.context_lens.shape[0], batch.block_tables.stride(0)
    return seqs, stride, heads, power_scale(scale, 0.0)


def _decode(
    q: Tensor,
    cache: Tensor,
    scales: Tensor | None,
    batch: AttentionBatch,
    scale: float,
    out: Tensor,
    constants: dict[str, int],
    parts: Parts,
    splitting: Splitting,
) -> None:
    heads, seqs = q.shape[1], batch.context_lens.shape[0]
    items = seqs * triton.cdiv(heads, constants["GROUP"]) * splitting.max_splits
    items *= min(SHORT, batch.max_query)
    _, multiprocessors, _ = device_traits(q.device)
    latent_decode_kernel[(min(multiprocessors, items),)](
        *_inputs(q, cache, scales, batch, out),
        *parts.tensors,
        *_numbers(batch, heads, scale),
        **constants,
        **splitting.constants,
        maxnreg=DECODE_REGISTERS,
        SEQS_PADDED=padded_seqs(seqs),
        **FUSED,
    )


def latent_constants(
    heads: int,
    rotated: int,
    latent: int,
    block_size: int,
    capability: int,
    *,
    quantized: bool,
    decode: bool,
) -> dict[str, int]:
    """Compile-time constants and launch options of both kernels; capability: 90 for 9.0.

    32 rows are what the registers of 8 warps hold: with 64, whose products Hopper and Blackwell
    compute by larger instructions, some of the sums would be spilled.
    """
    fewest = triton.cdiv(heads, _ROWS)
    counts = range(fewest, fewest + 1 if decode else heads + 1)
    # The number of programs a token takes; of equal ones the fewest that read the cache.
    groups = min(counts, key=lambda count: count / (_ROWS // triton.cdiv(heads, count)))
    group = int(triton.cdiv(heads, groups))
    rows = max(16, int(triton.next_power_of_2(group))) if decode else _ROWS
    # Two tiles of 32 keys and the queries take 110 KiB of shared memory, one of them 74 KiB; two of
    # 8 bits, loaded twice, at most 87 KiB.
    roomy = quantized or capability == 80 or 90 <= capability < 120
    return {
        "GROUP": group,
        "ROWS": rows,
        "ROTATED": rotated,
        "ROTATED_PADDED": max(16, int(triton.next_power_of_2(rotated))),
        "LATENT": latent,
        "LATENT_PADDED": max(16, int(triton.next_power_of_2(latent))),
        "BLOCK_SIZE": block_size,
        "TILE": 16 if quantized and rows > 16 else 32,
        "QUANTIZED": quantized,
        "STAGES": 5 if roomy else 3,
        "num_warps": 8,
    }
