"""How the keys of a sequence are cut into splits, and how the results of splits are combined.

A program computes a split by itself, and writes an unnormalised output with its running maximum and
sum, which a second kernel combines in order (Dao et al. 2023,
"Flash-Decoding for long-context inference"). The number of splits and their borders depend on the
sequence's own rows and context alone, so its result does not depend on the batch.

Parts are stored without gaps: of one sequence after the other, for each of its rows and query
heads as many as it has splits. A sequence in one split stores none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.triton.device import FUSED, device_traits
from nybble.kernels.triton.online_softmax import padded_seqs
from nybble.kernels.triton.overlap import follow, overlap_options

# A split has at least this many keys: below it, the second stage costs more than splitting saves.
# Those of several new tokens have twice as many at least, because they store more.
MIN_SPLIT = 256
# The most new tokens of a sequence that is decoded, if a program has rows for them: a draft's, or a
# short turn's.
SHORT = 16
PARTS = 256 << 20  # bytes of unnormalised outputs that exist at a time
_REDUCERS = 8  # programs of the second kernel on a multiprocessor


@dataclass(frozen=True)
class Splitting:
    """Into how many splits sequences are cut, on one device and for one model.

    max_splits: of a long context. One sequence that is decoded alone keeps every program busy.
    short: the most new tokens of a sequence that is decoded. Longer ones are prefilled:
    piece: new tokens that a program of prefill takes.
    pieces: such programs, for one KV head, that keep the device busy; at most ``max_splits``. A
        sequence with fewer is split until it has as many. 1: none is.
    """

    max_splits: int
    short: int
    piece: int = 1
    pieces: int = 1

    def most(self, rows: int) -> int:
        """Splits of a sequence with as many new tokens and a long context."""
        return self.max_splits if rows <= self.short else max(1, self.pieces // self._pieces(rows))

    def programs(self, rows: int) -> int:
        """Programs of prefill, for one KV head, that such a sequence may have."""
        return self._pieces(rows) * self.most(rows) if rows > self.short else 0

    def parts(self, rows: int) -> int:
        """Parts that such a sequence may have, for one query head."""
        return rows * self.most(rows) if self.most(rows) > 1 else 0

    def worst(self, rows: int) -> int:
        """Of as many new tokens or fewer, how many may have the most parts."""
        ends = (count * self.piece for count in range(1, self.pieces // 2 + 1))
        return max((min(rows, end) for end in (self.short, *ends)), key=self.parts)

    def _pieces(self, rows: int) -> int:
        return -(-rows // self.piece)

    @property
    def constants(self) -> dict[str, int]:
        """The compile-time constants of the kernels that call :func:`splits_of`."""
        return {
            "SHORT": self.short,
            "MIN_SPLIT": MIN_SPLIT,
            "MAX_SPLITS": self.max_splits,
            "PIECE": self.piece,
            "PIECES": self.pieces,
        }


@triton.jit
def visible_keys(length, context, window):
    """Keys that any of the last ``length`` tokens sees: all, or their windows' (0 is no window)."""
    return tl.where(window > 0, tl.minimum(context, window + length - 1), context)


@triton.jit
def splits_of(
    length,
    context,
    window,
    SHORT: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Into how many splits the keys of ``length`` new tokens are cut: 0 if there is nothing.

    Those of a prefill program's PIECE tokens, each of a sequence's programs into as many.
    """
    least = tl.where(length == 1, MIN_SPLIT, 2 * MIN_SPLIT)
    pieces = (length + PIECE - 1) // PIECE
    most = tl.where(length <= SHORT, MAX_SPLITS, tl.maximum(PIECES // tl.maximum(pieces, 1), 1))
    together = tl.where(length <= SHORT, length, tl.minimum(length, PIECE))
    visible = visible_keys(together, context, window)
    return tl.where(length > 0, tl.minimum((visible + least - 1) // least, most), 0)


@triton.jit(do_not_specialize=["seqs", "window"])
def reduce_kernel(
    query_start,
    context_lens,
    out,
    partial_out,
    partial_peak,
    partial_total,
    seqs,
    q_heads,
    window,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SEQS_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    SHORT: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    each = tl.arange(0, SEQS_PADDED)
    known = each < seqs
    lengths = tl.load(query_start + each + 1, known, 0) - tl.load(query_start + each, known, 0)
    contexts = tl.load(context_lens + each, known, 0)
    counts = splits_of(lengths, contexts, window, SHORT, MIN_SPLIT, MAX_SPLITS, PIECE, PIECES)
    rows = tl.where(counts > 1, lengths, 0)
    borders = tl.cumsum(rows, 0)
    split = tl.arange(0, SPLITS_PADDED)
    lane = tl.arange(0, DIM_PADDED)
    for item in range(tl.program_id(0), tl.sum(rows, 0) * q_heads, tl.num_programs(0)):
        q_head = item % q_heads
        rank = item // q_heads
        seq = tl.sum((borders <= rank).to(tl.int32), 0)
        count = tl.sum(tl.where(each == seq, counts, 0), 0)
        local = rank - tl.sum(tl.where(each < seq, rows, 0), 0)
        before = tl.sum(tl.where(each < seq, rows * counts, 0), 0).to(tl.int64)
        # Rounding splits up to whole tiles can leave the last ones without keys; they have stored
        # a peak of −∞ and weigh nothing.
        row = before * q_heads + (local * q_heads + q_head) * count + split
        peak = tl.load(partial_peak + row, split < count, float("-inf"))
        total = tl.load(partial_total + row, split < count, 0.0)
        weight = tl.exp2(peak - tl.max(peak, 0))
        part = tl.load(
            partial_out + row[:, None] * DIM + lane[None, :],
            (split < count)[:, None] & (lane < DIM)[None, :],
            0.0,
        )
        result = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
        token = tl.load(query_start + seq).to(tl.int64) + local
        to = (token * q_heads + q_head) * DIM + lane
        tl.store(out + to, result.to(out.dtype.element_ty), lane < DIM)


@dataclass(frozen=True)
class Parts:
    """Room for what splits compute, float32: ``(parts, dim)``, and ``(parts,)`` of the others.

    rows: new tokens that may have several parts; 0 if none can.
    """

    out: Tensor
    peak: Tensor
    total: Tensor
    rows: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.out, self.peak, self.total


def batches_of(
    batch: AttentionBatch, splitting: Splitting, q: Tensor, dim: int
) -> Iterator[tuple[AttentionBatch, Parts]]:
    """The sequences in batches whose parts take at most PARTS bytes, and room for these.

    At least 4 sequences, and a multiple, so that addresses are those of 16 bytes. q: the queries
    ``(tokens, heads, …)``; dim: elements of an output.
    """
    tokens, heads = q.shape[:2]
    seqs = batch.context_lens.shape[0]
    rows = batch.rows
    if rows is None:
        rows = (splitting.worst(batch.max_query),) * seqs
    for first, last, own, most in _cuts(rows, splitting, tokens, PARTS // (4 * heads * dim)):
        if own and batch.rows is None:
            own = tokens  # any of them may be those of a sequence that is split
        # A multiple of 4, for the same reason.
        size = max(4, -(-heads * most // 4) * 4)
        peak, total = q.new_empty((2, size), dtype=torch.float32)
        room = Parts(q.new_empty((size, dim), dtype=torch.float32), peak, total, own)
        yield (batch if last - first == seqs else batch.part(first, last)), room


@lru_cache(maxsize=64)  # a step's layers have the same
def _cuts(
    rows: tuple[int, ...], splitting: Splitting, tokens: int, limit: int
) -> list[tuple[int, int, int, int]]:
    """Batches of at most ``limit`` parts for each query head, if 4 sequences have no more.

    rows: the most that each sequence may have; tokens: those of all.

    Returns of each batch its first sequence, the one behind its last, how many rows may be split,
    and how many parts these may have for each query head.
    """
    all_parts = tokens * splitting.max_splits
    parts = [splitting.parts(own) for own in rows]
    borders = [0]
    taken = 0
    for next_ in range(0, len(rows), 4):
        more = sum(parts[next_ : next_ + 4])
        if next_ > borders[-1] and min(taken + more, all_parts) > limit:
            borders.append(next_)
            taken = 0
        taken += more
    cuts = []
    for first, last in pairwise([*borders, len(rows)]):
        split = sum(own for own in rows[first:last] if splitting.parts(own))
        most = min(sum(parts[first:last]), all_parts)
        cuts.append((first, last, min(split, tokens), most))
    return cuts


def reduce(
    batch: AttentionBatch, parts: Parts, splitting: Splitting, window: int, out: Tensor, heads: int
) -> None:
    """Combine the parts of a batch into the rows of ``out`` that were split."""
    if parts.rows == 0:
        return
    seqs = batch.context_lens.shape[0]
    _, multiprocessors, _ = device_traits(out.device)
    reduce_kernel[(min(parts.rows * heads, _REDUCERS * multiprocessors),)](
        batch.query_start,
        batch.context_lens,
        out,
        *parts.tensors,
        seqs,
        heads,
        window,
        **reduce_constants(parts.out.shape[1], splitting),
        SEQS_PADDED=padded_seqs(seqs),
        **overlap_options(out.device),
        **FUSED,
    )


def reduce_constants(dim: int, splitting: Splitting) -> dict[str, int]:
    """Compile-time constants and launch options of ``reduce_kernel``."""
    return {
        "DIM": dim,
        "DIM_PADDED": int(triton.next_power_of_2(dim)),
        "SPLITS_PADDED": int(triton.next_power_of_2(splitting.max_splits)),
        "num_warps": 4 if dim <= 256 else 8,
    } | splitting.constants
