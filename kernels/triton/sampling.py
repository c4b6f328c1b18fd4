"""Drawing the next token of every row in two launches, without sorting the vocabulary.

PROGRAMS programs share a row, so that one row keeps as many multiprocessors busy. Truncations are
thresholds on the logits: the k-th largest value, and the largest value whose tail holds top_p of
the probability, are found by bisecting the float's ordered bit pattern with seven probes a pass.
The token then comes from inverting the cumulative distribution over what is left, in vocabulary
order and in float64.

Those passes read few entries. The first launch finds the largest entry of each lane: of all columns
that are alike modulo TILE. In the second each program gathers, of its part of the vocabulary, the
entries that are not below the largest few of these, in vocabulary order: together at least as many.
If they hold what top_k and top_p keep, only they are searched; if not, as where a distribution is
flat, the whole row. (After Qrita, arXiv 2602.01518, which gathers by the deviation from the mean.)
If nothing is truncated, the parts' sums tell in which part the token is, and only that is searched.

In both launches the last program of a row to finish goes on with what all of them have left. It
adds in the order of the parts, and no row's result depends on another's: a row has the same token
in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.reference import TokenChoice
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.matmul import arrivals
from nybble.kernels.triton.overlap import follow, overlap_options

TILE = 2048
# Of a row whose vocabulary is larger than ALONE, as all but toys' are: others have one program.
PROGRAMS = 16
ALONE = 4 * TILE
WARPS = 8
# Entries of a row that are gathered at most: 1024 of the largest come with some 400 others, the
# 1536 that are taken for top_p alone with 1300, as the largest fall into lanes by chance. A part
# gathers a tile at most.
KEPT = 2 * TILE
STAGES = 4  # tiles in flight
# Rows of a launch at most. Each has 160 KiB of workspace.
ROWS = 128

_LOWEST = tl.constexpr(-(1 << 31))  # no key is below
# To take a few entries more than asked for costs less than the last five passes of a bisection.
_NEAR = tl.constexpr(1 << 14)


@triton.jit
def _key(x):
    """int32 that order as the floats do; −0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(
    entries,
    count,
    lowest,
    needed,
    peak,
    rate,
    BY_MASS: tl.constexpr,
    WITHIN: tl.constexpr,
    SOME: tl.constexpr,
):
    """The largest key at or above which there are ``needed`` entries, or that much exp2-mass.

    Or a key less than WITHIN below it. Entries below ``lowest`` do not count; if the others are too
    few, it is ``lowest``. SOME: entries at a time, for which eight sums are in registers.
    """
    low = lowest.to(tl.int64)
    high = _key(peak).to(tl.int64) + 1
    probe = tl.arange(0, 8) + 1
    while high - low > WITHIN:
        middle = low + (((high - low) * probe) >> 3)
        narrow = middle.to(tl.int32)
        found = tl.zeros([8, SOME], tl.float32)
        for first in range(0, count, SOME):
            at = first + tl.arange(0, SOME)[None, :]
            x = tl.load(entries + at, at < count, float("-inf"))
            key = _key(x)
            weight = tl.exp2((x - peak) * rate) if BY_MASS else tl.where(at < count, 1.0, 0.0)
            weight = tl.where(key >= lowest, weight, 0.0)
            found += tl.where(key >= narrow[:, None], weight, 0.0)
        enough = tl.sum(found, 1) >= needed
        low = tl.maximum(low, tl.max(tl.where(enough, middle, low), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, middle), 0))
    return low.to(tl.int32)


@triton.jit
def _weights(entries, first, count, lowest, min_p, peak, rate, TILE: tl.constexpr):
    """Places of a tile's entries, and their exp2-weights in float64: 0 if they cannot be drawn."""
    at = first + tl.arange(0, TILE)
    x = tl.load(entries + at, at < count, float("-inf"))
    p = tl.exp2((x - peak) * rate)
    return at, tl.where((_key(x) >= lowest) & (p >= min_p), p, 0.0).to(tl.float64)


@triton.jit
def _total(
    entries, begin, end, count, lowest, min_p, peak, rate, TILE: tl.constexpr, STAGES: tl.constexpr
):
    """The weight of what can be drawn from whole tiles: those from ``begin`` to ``end``."""
    total = tl.full([], 0.0, tl.float64)
    for first in tl.range(begin, end, TILE, num_stages=STAGES):
        total += tl.sum(_weights(entries, first, count, lowest, min_p, peak, rate, TILE)[1], 0)
    return total


@triton.jit
def _join(logits, gathered, held_by, count, kept, columns, TILE: tl.constexpr):
    """Put what the parts have gathered side by side, in the order of the vocabulary.

    held_by: how many entries each part has. count: all together.
    """
    SOME: tl.constexpr = TILE // 4  # at a time, each of which is compared with every part
    past = tl.cumsum(held_by, 0)[:, None]
    for first in range(0, count, SOME):
        at = first + tl.arange(0, SOME)
        before = (at[None, :] >= past).to(tl.int32)  # whether a part comes before this place's
        start = tl.sum(before * held_by[:, None], 0)
        source = gathered + tl.sum(before, 0) * TILE + at - start
        column = tl.load(source, at < count, 0)
        tl.store(columns + at, column, at < count)
        tl.store(kept + at, tl.load(logits + column, at < count), at < count)


@triton.jit
def _pick(entries, begin, end, count, lowest, min_p, target, below, peak, rate, TILE: tl.constexpr):
    """The place of the first entry up to which there is more weight than ``target``.

    It is searched for from ``begin``, before which there is ``below``. If there is none before
    ``end``, because of rounding, the last one that can be drawn; −1 if there is none either.
    """
    drawn = tl.full([], -1, tl.int32)
    searching = True
    for first in range(begin, end, TILE):
        if searching:
            at, p = _weights(entries, first, count, lowest, min_p, peak, rate, TILE)
            here = tl.sum(p, 0)
            last = tl.max(tl.where(p > 0, at, -1), 0)
            if last >= 0:
                drawn = last
            if below + here > target:
                passed = tl.sum((below + tl.cumsum(p, 0) <= target).to(tl.int32), 0)
                drawn = tl.minimum(first + passed, last)
                searching = False
            below += here
    return drawn


@triton.jit
def _choice(choices, row, vocab):
    """temperature, top_k, top_p, min_p and uniform of a row. top_k: 0 keeps all."""
    choices += row * 5
    top_k = tl.load(choices + 1).to(tl.int64)
    top_k = tl.where(top_k < vocab, top_k, 0).to(tl.int32)
    top_p = tl.load(choices + 2).to(tl.float32)
    min_p = tl.load(choices + 3).to(tl.float32)
    return tl.load(choices), top_k, top_p, min_p, tl.load(choices + 4)


@triton.jit
def _gathers(vocab, top_k, top_p, TILE: tl.constexpr, KEPT: tl.constexpr):
    """Whether it is tried to search only among the largest entries."""
    return (vocab > KEPT) & (((top_k > 0) & (top_k <= TILE)) | ((top_k == 0) & (top_p < 1)))


@triton.jit
def _is_last(arrived, PROGRAMS: tl.constexpr):
    """Whether this is the last of a row's programs to arrive: it sees all that the others wrote."""
    tl.debug_barrier()  # every lane's part is written before this program is counted
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == PROGRAMS - 1
    if last:
        tl.store(arrived, 0)  # as the next launch expects
    return last


@triton.jit
def largest_kernel(
    logits,  # float32 (rows, vocab)
    choices,  # float64 (rows, 5)
    tokens,  # int64 (rows,): the first of the largest entries
    least,  # int32 (rows,): the key of those that are gathered, at least
    peaks,  # float32 (rows, KEPT), of which TILE are used: each lane's largest entry
    places,  # int32 (rows, PROGRAMS): the first of each program's largest entries
    arrived,  # int32, zero, one for each row
    vocab,
    stride,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What is largest in each row. A program takes LANES lanes of every tile."""
    follow(OVERLAP)
    LANES: tl.constexpr = TILE // PROGRAMS
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    logits += row * stride
    peaks += row * KEPT
    places += row * PROGRAMS
    programs = tl.arange(0, PROGRAMS)
    lanes = tl.arange(0, LANES)[None, :]
    best = tl.full([PROGRAMS, LANES], float("-inf"), tl.float32)
    place = tl.zeros([PROGRAMS, LANES], tl.int32)
    for first in tl.range(0, vocab, PROGRAMS * TILE, num_stages=STAGES):
        column = first + programs[:, None] * TILE + program * LANES + lanes
        x = tl.load(logits + column, column < vocab, float("-inf"))
        place = tl.where(x > best, column, place)
        best = tl.maximum(best, x)
    of_lanes = tl.max(best, 0)
    peak = tl.max(of_lanes, 0)
    tl.store(peaks + program * LANES + tl.arange(0, LANES), of_lanes)
    tl.store(places + program, tl.min(tl.where(best == peak, place, vocab)))
    if _is_last(arrived + row, PROGRAMS):
        own = tl.max(tl.load(peaks + programs[:, None] * LANES + lanes), 1)
        peak = tl.max(own, 0)
        token = tl.min(tl.where(own == peak, tl.load(places + programs), vocab), 0)
        tl.store(tokens + row, token.to(tl.int64))
        temperature, top_k, top_p, _, _ = _choice(choices, row, vocab)
        if (temperature > 0) & _gathers(vocab, top_k, top_p, TILE, KEPT):
            # As many lanes have an entry which is not below ``least``, so as many entries are not.
            needed = tl.where(top_k > 0, top_k, TILE * 3 // 4).to(tl.float32)
            lowest = tl.full([], _LOWEST, tl.int32)
            found = _threshold(peaks, TILE, lowest, needed, peak, 1.0, False, _NEAR, TILE // 2)
            tl.store(least + row, found)


@triton.jit
def draw_kernel(
    logits,  # float32 (rows, vocab)
    choices,  # float64 (rows, 5)
    tokens,  # int64 (rows,): from the first of the largest entries to the one that is drawn
    least,  # int32 (rows,)
    gathered,  # int32 (rows, PROGRAMS, TILE): columns of the entries that each part has gathered
    counts,  # int32 (rows, PROGRAMS): how many these are, or would be
    sums,  # float64 (rows, 2, PROGRAMS): each part's exp2-mass, and that of what it has gathered
    kept,  # float32 (rows, KEPT): what all parts have gathered
    columns,  # int32 (rows, KEPT)
    arrived,  # int32, zero, one for each row
    vocab,
    stride,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The token of each row that is not greedy. A program takes a part of the vocabulary."""
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature, top_k, top_p, min_p, uniform = _choice(choices, row, vocab)
    if temperature > 0:
        logits += row * stride
        gathered += row * (PROGRAMS * TILE)
        counts += row * PROGRAMS
        sums += row * (2 * PROGRAMS)
        kept += row * KEPT
        columns += row * KEPT
        gathers = _gathers(vocab, top_k, top_p, TILE, KEPT)
        truncates = (top_k > 0) | (top_p < 1)
        rate = (1.4426950408889634 / temperature).to(tl.float32)
        token = tl.load(tokens + row)
        peak = tl.load(logits + token)
        lowest = tl.full([], _LOWEST, tl.int32)
        each = tl.cdiv(tl.cdiv(vocab, TILE), PROGRAMS) * TILE
        begin = part * each
        end = tl.minimum(begin + each, vocab)
        lane = tl.arange(0, TILE)
        if gathers:
            bound = tl.load(least + row)
            count = tl.full([], 0, tl.int32)
            total = tl.zeros([TILE], tl.float32)
            held = tl.zeros([TILE], tl.float32)
            for first in tl.range(begin, end, TILE, num_stages=STAGES):
                column = first + lane
                x = tl.load(logits + column, column < vocab, float("-inf"))
                weight = tl.exp2((x - peak) * rate)
                # What is excluded is never drawn, so it need not be among those gathered.
                here = (_key(x) >= bound) & (x > float("-inf"))
                total += weight
                held += tl.where(here, weight, 0.0)
                more = tl.sum(here.to(tl.int32), 0)
                if (more > 0) & (count + more <= TILE):
                    place = count + tl.cumsum(here.to(tl.int32), 0) - 1
                    tl.store(gathered + part * TILE + place, column, here)
                count += more
            tl.store(counts + part, count)
            tl.store(sums + part, tl.sum(total, 0).to(tl.float64))
            tl.store(sums + PROGRAMS + part, tl.sum(held, 0).to(tl.float64))
        elif not truncates:
            tl.store(
                sums + part,
                _total(logits, begin, end, vocab, lowest, min_p, peak, rate, TILE, STAGES),
            )
        if _is_last(arrived + row, PROGRAMS):
            parts = tl.arange(0, PROGRAMS)
            entries, size = logits, vocab
            only = False  # whether only what was gathered is searched
            mass = tl.full([], -1.0, tl.float32)
            if gathers:
                held_by = tl.load(counts + parts)
                count = tl.sum(held_by, 0)
                only = (count <= KEPT) & (tl.max(held_by, 0) <= TILE)
                if top_k == 0:
                    all_mass = tl.sum(tl.load(sums + parts), 0)
                    mass = all_mass.to(tl.float32)
                    only &= tl.sum(tl.load(sums + PROGRAMS + parts), 0) >= all_mass * top_p
                if only:
                    _join(logits, gathered, held_by, count, kept, columns, TILE)
                    tl.debug_barrier()
                    entries, size, lowest = kept, count, tl.load(least + row)
            if top_k > 0:
                needed = top_k.to(tl.float32)
                lowest = _threshold(entries, size, lowest, needed, peak, rate, False, 1, TILE // 2)
            if top_p < 1:
                if mass < 0:  # of what top_k keeps
                    all_mass = _total(entries, 0, size, size, lowest, 0.0, peak, rate, TILE, 1)
                    mass = all_mass.to(tl.float32)
                lowest = _threshold(
                    entries, size, lowest, mass * top_p, peak, rate, True, 1, TILE // 2
                )
            start, stop = 0, size
            below = tl.full([], 0.0, tl.float64)
            if truncates:
                target = uniform * _total(
                    entries, 0, size, size, lowest, min_p, peak, rate, TILE, 1
                )
            else:
                by_part = tl.load(sums + parts)
                target = uniform * tl.sum(by_part, 0)
                # Not past the last part with anything in it, where rounding could put the target.
                last = tl.max(tl.where(by_part > 0, parts, 0), 0)
                of_token = tl.minimum(
                    tl.sum((tl.cumsum(by_part, 0) <= target).to(tl.int32), 0), last
                )
                below = tl.sum(tl.where(parts < of_token, by_part, 0.0), 0)
                start = of_token * each
                stop = tl.minimum(start + each, vocab)
            drawn = _pick(
                entries, start, stop, size, lowest, min_p, target, below, peak, rate, TILE
            )
            if drawn >= 0:
                if only:
                    drawn = tl.load(columns + drawn)
                tl.store(tokens + row, drawn.to(tl.int64))


def sample_tokens(logits: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
    """See :func:`nybble.kernels.reference.sample_tokens`. One stream of a device at a time."""
    packed = torch.tensor(choices, dtype=torch.float64)
    if logits.is_cuda:
        packed = packed.pin_memory().to(logits.device, non_blocking=True)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), ROWS):
        some = slice(first, first + ROWS)
        _sample(logits[some], packed[some], tokens[some])
    return tokens


def _sample(logits: Tensor, choices: Tensor, tokens: Tensor) -> None:
    """Launch both kernels for at most ROWS rows."""
    rows, vocab = logits.shape
    device = logits.device
    constants = sampling_constants(vocab)
    programs = constants["PROGRAMS"]
    floats = torch.empty(rows, KEPT, dtype=torch.float32, device=device)
    numbers = torch.empty(rows, programs, dtype=torch.int32, device=device)
    least = torch.empty(rows, dtype=torch.int32, device=device)
    gathered = torch.empty(rows, programs, TILE, dtype=torch.int32, device=device)
    sums = torch.empty(rows, 2, programs, dtype=torch.float64, device=device)
    columns = torch.empty(rows, KEPT, dtype=torch.int32, device=device)
    first = (logits, choices, tokens, least)
    last = (arrivals(device), vocab, logits.stride(0))
    options = {**constants, "num_warps": WARPS, **overlap_options(device), **FUSED}
    grid = (rows, programs)
    largest_kernel[grid](*first, floats, numbers, *last, **options)
    draw_kernel[grid](*first, gathered, numbers, sums, floats, columns, *last, **options)


def sampling_constants(vocab: int) -> dict[str, int]:
    """Compile-time constants of both kernels."""
    programs = PROGRAMS if vocab > ALONE else 1
    return {"TILE": TILE, "PROGRAMS": programs, "KEPT": KEPT, "STAGES": STAGES}
