"""Attention of sequences with one new token: split-KV decode ("flash-decoding").

A sequence's keys are cut into splits whose number and borders depend on its own context length
alone, so its result does not depend on the batch. The (sequence, KV head, split) items of all
sequences are distributed over a fixed number of programs. Each item writes an unnormalised
output and its running maximum and sum, which a second kernel combines in order (Dao et al. 2023,
"Flash-Decoding for long-context inference").

The query heads of a KV head are padded to 16 rows, the minimum of a tensor-core product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.triton.device import FUSED, device_traits
from nybble.kernels.triton.online_softmax import LOG2_E, attend, padded_seqs, power_scale

# A split has at least this many keys: below it, the second stage costs more than splitting saves.
MIN_SPLIT = 256
DECODE_TILE = 64  # keys per step of the inner loop; half if that overfills the registers
# The block table is loaded ahead of what it points to, so five stages keep two tiles of keys and
# values in flight: 64 KiB a program for 16-bit heads of 128 or 256.
DECODE_STAGES = 5
PARTS = 256 << 20  # bytes of unnormalised outputs that exist at a time
PROGRAMS_PER_SM = 3  # that fit on an H100 by registers and shared memory; 2 of wide heads


@triton.jit
def splits_of(visible, MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """How many splits ``visible`` keys are cut into: 0 for none."""
    return tl.minimum((visible + MIN_SPLIT - 1) // MIN_SPLIT, MAX_SPLITS)


@triton.jit
def visible_keys(context, window):
    """Keys the last token sees: all, or the last ``window`` of them (0 is no window)."""
    return tl.where(window > 0, tl.minimum(context, window), context)


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
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SEQS_PADDED: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    each = tl.arange(0, SEQS_PADDED)
    known = each < seqs
    starts = tl.load(query_start + each, known, 0)
    ends = tl.load(query_start + each + 1, known, 0)
    visibles = visible_keys(tl.load(context_lens + each, known, 0), window)
    splits = tl.where(ends - starts == 1, splits_of(visibles, MAX_SPLITS, MIN_SPLIT), 0)
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
        visible = visible_keys(context, window)
        count = splits_of(visible, MAX_SPLITS, MIN_SPLIT)
        # Whole tiles, so that only the last one of a sequence is masked.
        length = tl.cdiv(tl.cdiv(visible, count), TILE) * TILE
        key_begin = context - visible + split * length
        key_end = tl.minimum(key_begin + length, context)

        token = tl.load(query_start + seq).to(tl.int64)
        q_head = head * GROUP + member
        query = tl.load(q + token * q_stride + q_head[:, None] * DIM + lane[None, :], mask, 0.0)
        accumulators = (tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32),)
        peak = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PADDED], tl.float32)
        if HAS_SINKS:
            # The sink is one more key, counted by the first split only.
            sink = tl.load(sinks + q_head, member < GROUP, float("-inf")).to(tl.float32)
            peak = tl.where(split == 0, sink * LOG2_E, peak)
            total = tl.where(split == 0, 1.0, total)
        table = block_tables + seq.to(tl.int64) * table_stride
        position = context - 1 + tl.zeros([GROUP_PADDED], tl.int32)
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
                False,
                False,
            )
        accumulator = accumulators[0]
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
    visible = visible_keys(tl.load(context_lens + seq), window)
    count = tl.where(is_decode, splits_of(visible, MAX_SPLITS, MIN_SPLIT), 0)
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


def programs_at_once(dim: int, multiprocessors: int) -> int:
    """Programs that a device with as many multiprocessors runs at once."""
    return (PROGRAMS_PER_SM if dim <= 128 else 2) * multiprocessors


def max_splits(kv_heads: int, resident: int) -> int:
    """Splits of a long context: one sequence alone keeps every program busy.

    Depends on the model and the device, never on the batch.
    """
    return max(8, min(64, resident // kv_heads))


def batches_of(batch: AttentionBatch, part: int) -> Iterator[AttentionBatch]:
    """The sequences in batches whose splits take at most PARTS bytes, ``part`` each.

    At least 4 sequences, and a multiple, so that addresses are those of 16 bytes.
    """
    seqs = batch.context_lens.shape[0]
    each = max(4, PARTS // part // 4 * 4)
    for first in range(0, seqs, each):
        last = min(first + each, seqs)
        yield replace(
            batch,
            query_start=batch.query_start[first : last + 1],
            context_lens=batch.context_lens[first:last],
            block_tables=batch.block_tables[first:last],
        )


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
) -> None:
    q_heads, dim = q.shape[1:]
    _, multiprocessors, _ = device_traits(q.device)
    splits = max_splits(k_cache.shape[1], programs_at_once(dim, multiprocessors))
    for few in batches_of(batch, 4 * q_heads * splits * dim):
        _decode(q, k_cache, v_cache, scales, few, scale, window, softcap, sinks, out, splits)


def _decode(
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
    splits: int,
) -> None:
    q_heads, dim = q.shape[1:]
    seqs, kv_heads = batch.context_lens.shape[0], k_cache.shape[1]
    _, multiprocessors, _ = device_traits(q.device)
    resident = programs_at_once(dim, multiprocessors)
    partial_out = q.new_empty((seqs, q_heads, splits, dim), dtype=torch.float32)
    partial_peak = q.new_empty((seqs, q_heads, splits), dtype=torch.float32)
    partial_total = torch.empty_like(partial_peak)
    constants = decode_constants(
        q_heads // kv_heads, dim, k_cache.shape[2], quantized=scales is not None
    )
    decode_kernel[(min(resident, seqs * kv_heads * splits),)](
        q,
        k_cache,
        v_cache,
        *(scales or (k_cache, v_cache)),  # never read if there are none
        q if sinks is None else sinks,  # likewise
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
        power_scale(scale, softcap),
        window,
        **constants,
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        SEQS_PADDED=padded_seqs(seqs),
        MAX_SPLITS=splits,
        **FUSED,
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
        **FUSED,
    )


def decode_constants(group: int, dim: int, block_size: int, *, quantized: bool) -> dict[str, int]:
    """Compile-time constants and launch options of ``decode_kernel`` for a model's sizes."""
    padded = int(triton.next_power_of_2(dim))
    return {
        "GROUP": group,
        "GROUP_PADDED": max(16, int(triton.next_power_of_2(group))),
        "DIM": dim,
        "DIM_PADDED": padded,
        "BLOCK_SIZE": block_size,
        "TILE": DECODE_TILE // 2 if quantized or padded > 128 else DECODE_TILE,
        "QUANTIZED": quantized,
        "MIN_SPLIT": MIN_SPLIT,
        "STAGES": DECODE_STAGES,
        "num_warps": 4,
    }
