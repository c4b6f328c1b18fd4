"""The online-softmax step over a tile of keys, shared by the attention kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels.triton.eight_bits import by_way_of_shared_memory, widened

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_heads(
    cache,
    row,
    inside,
    first,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Elements ``first`` … ``first + WIDTH − 1`` of the heads in these rows: ``(keys, WIDTH)``."""
    lane = first + tl.arange(0, WIDTH)
    at = row[:, None] * DIM + lane[None, :]
    mask = inside[:, None] if DIM == DIM_PADDED else inside[:, None] & (lane < DIM)[None, :]
    return tl.load(cache + at, mask, 0.0)


@triton.jit
def attend(
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
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One step of the online softmax: keys ``first`` … ``first + TILE − 1`` below ``key_end``.

    CAUSAL masks what a row does not see, and reads no key below ``key_begin``; WHOLE says that
    every row sees every key of the tile. ``position`` is the position of each query row. ``scale``
    is :func:`power_scale`'s: powers are of two. ``accumulators`` is a tuple of equal parts of the
    head, each the sum of products of its own.
    """
    key = first + tl.arange(0, TILE)
    inside = tl.full([TILE], True, tl.int1) if WHOLE else key < key_end
    if CAUSAL:
        inside = inside & (key >= key_begin)
    block = tl.load(table + key // BLOCK_SIZE, inside, 0).to(tl.int64)
    row = (block * kv_heads + head) * BLOCK_SIZE + key % BLOCK_SIZE
    keys = _load_heads(k_cache, row, inside, 0, DIM, DIM_PADDED, DIM_PADDED)
    keys = widened(keys, query.dtype)
    if QUANTIZED and query.shape[0] > 64:
        keys = by_way_of_shared_memory(keys, key_end)
    scores = tl.dot(query, tl.trans(keys)) * scale
    if QUANTIZED:
        scores *= tl.load(k_scales + row, inside, 0.0)[None, :]
    if SOFTCAP > 0:
        # tanh(x) is 1 − 2 / (1 + e²ˣ).
        scores = SOFTCAP * LOG2_E * (1.0 - 2.0 / (1.0 + tl.exp2(scores)))
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
    PART: tl.constexpr = DIM_PADDED // len(accumulators)
    shrunk = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(accumulators)):
        shrunk += (accumulators[part] * shrink[:, None],)
    if QUANTIZED:
        weights *= tl.load(v_scales + row, inside, 0.0)[None, :]
    weights = weights.to(query.dtype)
    summed = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(accumulators)):
        values = _load_heads(v_cache, row, inside, part * PART, DIM, DIM_PADDED, PART)
        values = widened(values, query.dtype)
        if QUANTIZED:
            values = by_way_of_shared_memory(values, key_end)
        summed += (tl.dot(weights, values, shrunk[part]),)
    return summed, new_peak, total


def power_scale(scale: float, softcap: float) -> float:
    """What makes a query times a key the power of two that :func:`attend` takes."""
    log2_e: float = LOG2_E.value
    return 2 * scale * log2_e / softcap if softcap else scale * log2_e


def padded_seqs(seqs: int) -> int:
    """``seqs`` rounded up to one of few sizes, so that few variants are compiled."""
    return max(16, int(triton.next_power_of_2(seqs)))
