"""Drawing the next token of every row in one launch, without sorting the vocabulary.

A program takes a row. Truncations are thresholds on the logits: the k-th largest value, and the
largest value whose tail holds top_p of the probability, are found by bisecting the float's ordered
bit pattern with seven probes a pass, eleven passes for all 32 bits. The token then comes from
inverting the cumulative distribution over what is left, in vocabulary order and in float64. No
row's result depends on another's.

Those passes read few entries. The first pass over a row keeps the largest entry of each lane, the
second gathers the entries that are not below the largest few of these, in vocabulary order: at
least as many. If they hold what top_k and top_p keep, only they are searched; if not, as where a
distribution is flat, the whole row. (After Qrita, arXiv 2602.01518, which gathers by the deviation
from the mean.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.reference import TokenChoice
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.overlap import follow, overlap_options

TILE = 2048
WARPS = 16
_PASSES = 11  # 8^11 > 2^32
# Entries of a row that are gathered at most: 1024 of the largest come with some 400 others, the
# 1536 that are taken for top_p alone with 1300, as the largest fall into lanes by chance.
KEPT = 2 * TILE
STAGES = 4  # tiles in flight


@triton.jit
def _key(x):
    """int32 that order as the floats do; −0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(
    logits,
    vocab,
    lowest,
    highest,
    needed,
    peak,
    rate,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
    PASSES: tl.constexpr,
):
    """The largest key at or above which there are ``needed`` entries, or that much exp2-mass.

    Entries below ``lowest`` do not count. ``highest`` is above every entry.
    """
    low = lowest
    high = highest
    probe = tl.arange(0, 8) + 1
    for _ in range(PASSES):
        middle = low + (((high - low) * probe) >> 3)
        narrow = middle.to(tl.int32)
        found = tl.zeros([8, TILE], tl.float32)
        for first in range(0, vocab, TILE):
            column = first + tl.arange(0, TILE)
            x = tl.load(logits + column, column < vocab, float("-inf"))
            key = _key(x)
            weight = tl.exp2((x - peak) * rate) if BY_MASS else tl.where(column < vocab, 1.0, 0.0)
            weight = tl.where(key >= lowest, weight, 0.0)
            found += tl.where(key[None, :] >= narrow[:, None], weight[None, :], 0.0)
        enough = tl.sum(found, 1) >= needed
        low = tl.maximum(low, tl.max(tl.where(enough, middle, low), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, middle), 0))
    return low


@triton.jit
def _draw(
    logits,
    count,
    token,
    top_k,
    top_p,
    min_p,
    uniform,
    peak,
    rate,
    mass,
    TILE: tl.constexpr,
    PASSES: tl.constexpr,
):
    """The place of the entry that is drawn from the ``count`` at ``logits``; ``token`` if none is.

    top_k: 0 keeps all. mass: what top_p is a part of; below 0, that of what top_k keeps.
    """
    lowest = tl.full([], -(1 << 31), tl.int64)
    highest = _key(peak).to(tl.int64) + 1
    if top_k > 0:
        needed = top_k.to(tl.float32)
        lowest = _threshold(logits, count, lowest, highest, needed, peak, rate, False, TILE, PASSES)
    if top_p < 1:
        if mass < 0:
            sums = tl.zeros([TILE], tl.float32)
            for first in range(0, count, TILE):
                column = first + tl.arange(0, TILE)
                x = tl.load(logits + column, column < count, float("-inf"))
                sums += tl.where(_key(x) >= lowest, tl.exp2((x - peak) * rate), 0.0)
            mass = tl.sum(sums, 0)
        needed = mass * top_p
        lowest = _threshold(logits, count, lowest, highest, needed, peak, rate, True, TILE, PASSES)
    total = tl.full([], 0.0, tl.float64)
    for first in range(0, count, TILE):
        column = first + tl.arange(0, TILE)
        x = tl.load(logits + column, column < count, float("-inf"))
        p = tl.exp2((x - peak) * rate)
        p = tl.where((_key(x) >= lowest) & (p >= min_p), p, 0.0)
        total += tl.sum(p.to(tl.float64), 0)
    target = uniform * total
    below = tl.full([], 0.0, tl.float64)
    found = False
    for first in range(0, count, TILE):
        if not found:
            column = first + tl.arange(0, TILE)
            x = tl.load(logits + column, column < count, float("-inf"))
            p = tl.exp2((x - peak) * rate)
            p = tl.where((_key(x) >= lowest) & (p >= min_p), p, 0.0)
            wide = p.to(tl.float64)
            here = tl.sum(wide, 0)
            # The last entry that can be drawn, should rounding have put the target at the end.
            last = tl.max(tl.where(p > 0, column, -1), 0)
            if last >= 0:
                token = last
            if below + here > target:
                passed = tl.sum((below + tl.cumsum(wide, 0) <= target).to(tl.int32), 0)
                token = tl.minimum(first + passed, last)
                found = True
            below += here
    return token


@triton.jit
def sample_kernel(
    logits,
    choices,
    tokens,
    kept,  # float32 (rows, KEPT)
    columns,  # int32 (rows, KEPT)
    vocab,
    stride,
    TILE: tl.constexpr,
    PASSES: tl.constexpr,
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    kept += row * KEPT
    columns += row * KEPT
    lane = tl.arange(0, TILE)
    temperature = tl.load(choices + row * 5)
    top_k = tl.load(choices + row * 5 + 1).to(tl.int64)
    top_p = tl.load(choices + row * 5 + 2).to(tl.float32)
    min_p = tl.load(choices + row * 5 + 3).to(tl.float32)
    uniform = tl.load(choices + row * 5 + 4)
    top_k = tl.where(top_k < vocab, top_k, 0)

    peaks = tl.full([TILE], float("-inf"), tl.float32)
    places = tl.zeros([TILE], tl.int32)
    for first in tl.range(0, vocab, TILE, num_stages=STAGES):
        column = first + lane
        x = tl.load(logits + column, column < vocab, float("-inf"))
        places = tl.where(x > peaks, column, places)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks, 0)
    token = tl.min(tl.where(peaks == peak, places, vocab), 0)

    if temperature > 0:
        rate = (1.4426950408889634 / temperature).to(tl.float32)
        truncates = ((top_k > 0) & (top_k <= TILE)) | ((top_k == 0) & (top_p < 1))
        mass = tl.full([], -1.0, tl.float32)
        count = tl.full([], KEPT + 1, tl.int32)
        if truncates & (vocab > KEPT):
            # As many lanes have an entry which is not below ``least``, so as many entries are not.
            lanes = tl.where(top_k > 0, top_k, TILE * 3 // 4).to(tl.float32)
            tl.store(kept + lane, peaks)
            tl.debug_barrier()
            lowest = tl.full([], -(1 << 31), tl.int64)
            highest = _key(peak).to(tl.int64) + 1
            least = _threshold(kept, TILE, lowest, highest, lanes, peak, rate, False, TILE, PASSES)
            tl.debug_barrier()  # the lanes' peaks are read before entries take their place
            count = tl.full([], 0, tl.int32)
            sums = tl.zeros([TILE], tl.float32)
            held = tl.zeros([TILE], tl.float32)
            for first in tl.range(0, vocab, TILE, num_stages=STAGES):
                column = first + lane
                x = tl.load(logits + column, column < vocab, float("-inf"))
                weight = tl.exp2((x - peak) * rate)
                # What is excluded is never drawn, so it need not be among those gathered.
                here = (_key(x) >= least) & (x > float("-inf"))
                sums += weight
                held += tl.where(here, weight, 0.0)
                more = tl.sum(here.to(tl.int32), 0)
                if (more > 0) & (count + more <= KEPT):
                    place = count + tl.cumsum(here.to(tl.int32), 0) - 1
                    tl.store(kept + place, x, here)
                    tl.store(columns + place, column, here)
                count += more
            if top_k == 0:
                mass = tl.sum(sums, 0)
                if tl.sum(held, 0) < mass * top_p:
                    count = tl.full([], KEPT + 1, tl.int32)
            tl.debug_barrier()
        if count <= KEPT:
            none = tl.full([], -1, tl.int32)
            place = _draw(
                kept, count, none, top_k, top_p, min_p, uniform, peak, rate, mass, TILE, PASSES
            )
            if place >= 0:
                token = tl.load(columns + place)
        else:
            token = _draw(
                logits, vocab, token, top_k, top_p, min_p, uniform, peak, rate, mass, TILE, PASSES
            )
    tl.store(tokens + row, token.to(tl.int64))


def sample_tokens(logits: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
    """See :func:`nybble.kernels.reference.sample_tokens`."""
    rows, vocab = logits.shape
    packed = torch.tensor(choices, dtype=torch.float64)
    if logits.is_cuda:
        packed = packed.pin_memory().to(logits.device, non_blocking=True)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    kept = torch.empty(rows, KEPT, dtype=torch.float32, device=logits.device)
    columns = torch.empty(rows, KEPT, dtype=torch.int32, device=logits.device)
    sample_kernel[(rows,)](
        logits,
        packed,
        tokens,
        kept,
        columns,
        vocab,
        logits.stride(0),
        **sampling_constants(),
        num_warps=WARPS,
        **overlap_options(logits.device),
        **FUSED,
    )
    return tokens


def sampling_constants() -> dict[str, int]:
    """Compile-time constants of the kernel."""
    return {"TILE": TILE, "PASSES": _PASSES, "KEPT": KEPT, "STAGES": STAGES}
