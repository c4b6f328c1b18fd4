"""The changes that adapters make to the embedding, the output layer and norms.

They have no slots: such a matrix is large, few adapters have one, and they differ in what they
change. An adapter in a slot refers to its tensors in host memory, whose bytes count towards the
host memory for adapters. So they are computed on the CPU only. Every row is computed by the kernels
that compute the base's, and does not depend on the other rows.

A matrix that was saved because the vocabulary was resized, or because it was trained, mostly has
rows of the base. If more than half of them are, only the others are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble.engine.base_layers import BaseLayers, BaseModel
from nybble.engine.parts import NormPart, norm_part
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.backend import Backend
from nybble.kernels.lora import LoRASlots, Matrices
from nybble.kernels.lora import in_8_bits as rounded_rows
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.matmul import preferred_layout
from nybble.kernels.packed import LinearKernel, Weight, round_to_int8
from nybble.kernels.reference import stretch_add
from nybble.loaders import LoRAAdapter
from nybble.loaders.adapter import LoRAModule
from nybble.loaders.adapter_changes import MatrixChange
from nybble.models import Architecture

# Inputs that share a scale in 8 bits, if the width is a multiple of so many.
_GROUP_SIZE = 128


@dataclass(frozen=True)
class _LowRank:
    """A single adapter in a slot by itself."""

    slots: LoRASlots
    backend: Backend

    @classmethod
    def of(cls, a: Tensor, b: Tensor, dtype: torch.dtype, backend: Backend) -> _LowRank:
        """a: ``(rank, in)``; b: ``(out, rank)``, multiplied by α/r."""
        matrices = Matrices(a.to(dtype).contiguous(), b.to(dtype).T.contiguous())
        return cls(LoRASlots.of([[matrices]], a.shape[1], (0, len(b))), backend)

    def add(self, out: Tensor, x: Tensor) -> None:
        batch = LoRABatch.of([0] * len(x), x.device)
        if batch is not None:
            self.backend.lora_add(out, x, self.slots, batch)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        pair = self.slots.matrices[0][0]
        return () if pair is None else pair[:2]


@dataclass(frozen=True)
class _Rounded:
    """A matrix in 8 bits, whose rows are looked up.

    codes: int8 ``(rows, columns)``. scales: float32 ``(rows,)``.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __getitem__(self, rows: Tensor) -> Tensor:
        return (self.codes[rows].float() * self.scales[rows, None]).to(self.dtype)


@dataclass(frozen=True)
class _Embedding:
    """See :class:`nybble.loaders.adapter_changes.MatrixChange`.

    table: ``(vocab, rank)``, what ``low_rank`` expands for each token; both None without LoRA.
    """

    matrix: Tensor | _Rounded | None
    ids: Tensor | None
    rows: Tensor | None
    table: Tensor | None
    low_rank: _LowRank | None

    def __call__(self, token_ids: Tensor, base: Tensor) -> Tensor:
        """The embeddings of tokens, of which the base's are ``base``."""
        out = base if self.matrix is None else self.matrix[token_ids]
        if self.ids is not None and self.rows is not None:
            at = torch.searchsorted(self.ids, token_ids).clamp_(max=len(self.ids) - 1)
            out = torch.where((self.ids[at] == token_ids)[:, None], self.rows[at], out)
        if self.low_rank is not None and self.table is not None:
            out = out.contiguous()
            self.low_rank.add(out, self.table[token_ids])
        return out

    @property
    def tensors(self) -> Iterator[Tensor | None]:
        yield from (self.ids, self.rows, self.table)
        if isinstance(self.matrix, _Rounded):
            yield from (self.matrix.codes, self.matrix.scales)
        else:
            yield self.matrix
        if self.low_rank is not None:
            yield from self.low_rank.tensors


@dataclass(frozen=True)
class _Head:
    """See :class:`nybble.loaders.adapter_changes.MatrixChange`.

    whole, some: compute the logits of all tokens, or of ``ids``, instead of the base's.
    rows: how many tokens it has logits for.
    outputs: gains and shifts, float32 ``(2, vocab)``, as of projections (DoRA and biases).
    tensors: what these hold.
    """

    whole: LinearKernel | None
    ids: Tensor | None
    some: LinearKernel | None
    outputs: Tensor | None
    low_rank: _LowRank | None
    rows: int
    tensors: Sequence[Tensor | None]

    def __call__(self, x: Tensor, base: Tensor) -> Tensor:
        """The logits of normed hidden states, of which the base's are ``base``.

        Those have as many columns at least.
        """
        out = base[:, : self.rows].contiguous() if self.whole is None else self.whole(x)
        if self.ids is not None and self.some is not None:
            out[:, self.ids] = self.some(x)
        if self.outputs is not None:
            stretch_add(out, torch.arange(len(out)), *self.outputs)
        if self.low_rank is not None:
            out = out.contiguous()
            self.low_rank.add(out, x)
        return out


@dataclass(frozen=True)
class StagedEnds:
    """What one adapter changes at the ends.

    norms: instead of the base's, by their names.
    known: one more than the highest token that it knows; None for what the base knows.
    """

    embedding: _Embedding | None
    head: _Head | None
    norms: Mapping[str, NormPart]
    tensors: tuple[Tensor, ...]
    known: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(each.nbytes for each in self.tensors)

    def is_finite(self) -> bool:
        return all(bool(each.isfinite().all()) for each in self.tensors)


@dataclass(frozen=True)
class StepEnds:
    """The ends of the adapters in a step: each with the rows that use it, int64."""

    entries: Sequence[tuple[StagedEnds, Tensor]]

    def of(self, rows: Tensor) -> StepEnds | None:
        """The same for these rows of the step, int64; None if none of them uses any."""
        found = [(ends, torch.isin(rows, own).nonzero()[:, 0]) for ends, own in self.entries]
        found = [(ends, own) for ends, own in found if len(own)]
        return StepEnds(found) if found else None

    def embed(self, out: Tensor, token_ids: Tensor) -> None:
        """Write the adapters' embeddings over the base's in ``out``."""
        for ends, rows in self.entries:
            if ends.embedding is not None:
                out[rows] = ends.embedding(token_ids[rows], out[rows])

    @property
    def rows(self) -> int:
        """The most tokens that the head of an adapter has; 0 if they have none."""
        return max((0 if e.head is None else e.head.rows for e, _ in self.entries), default=0)

    @property
    def change_norms(self) -> bool:
        return any(ends.norms for ends, _ in self.entries)

    def norms(self, name: str) -> Iterator[tuple[Tensor, NormPart]]:
        """Rows that have another norm of this name, and the norm."""
        for ends, rows in self.entries:
            if name in ends.norms:
                yield rows, ends.norms[name]

    def head(self, logits: Tensor, x: Tensor) -> Tensor:
        """The logits of normed hidden states: the adapters' written over the base's ``logits``.

        They have more columns than the base's if an adapter has more tokens, and mean nothing for
        the tokens that a row's adapter does not know; see :meth:`bar_unknown`.
        """
        heads = [(ends.head, rows) for ends, rows in self.entries if ends.head is not None]
        more = self.rows - logits.shape[1]
        if more > 0:
            logits = torch.nn.functional.pad(logits, (0, more))
        for head, rows in heads:
            logits[rows, : head.rows] = head(x[rows], logits[rows])
        return logits

    def bar_unknown(self, logits: Tensor, known: int) -> None:
        """Set the logits of tokens that a row's adapter does not know to −inf.

        known: one more than the highest token that the base knows.
        """
        if all(ends.known is None for ends, _ in self.entries):
            logits[:, known:] = float("-inf")
            return
        limits = torch.full((len(logits), 1), known)
        for ends, rows in self.entries:
            if ends.known is not None:
                limits[rows] = ends.known
        logits.masked_fill_(torch.arange(logits.shape[1]) >= limits, float("-inf"))


def stage_ends(
    adapter: LoRAAdapter,
    architecture: Architecture,
    base: BaseModel,
    dtype: torch.dtype,
    known: int | None = None,
    *,
    in_8_bits: bool = False,
) -> StagedEnds | None:
    """What the adapter changes at the ends, in ``dtype``; None if nothing.

    known: one more than the highest token that it knows; None for what the base knows.
    in_8_bits: whether whole matrices are rounded to 8 bits.
    """
    embedding = head = None
    tensors: list[Tensor | None] = []
    rows = adapter.vocab or architecture.vocab
    if (change := adapter.embedding) is not None:
        embedding = _staged_embedding(
            _as_rows(_without_base(change, base.embedding), base.embedding),
            base.backend,
            dtype,
            in_8_bits=in_8_bits,
        )
        tensors += embedding.tensors
    if (change := adapter.head) is not None:
        head = _staged_head(
            _without_base(change, base.head), base, dtype, rows, in_8_bits=in_8_bits
        )
        tensors += head.tensors
    norms: dict[str, NormPart] = {}
    for name in dict.fromkeys(each.rpartition(".")[0] for each in adapter.norms):
        shape = base.norm_tensors[name][0].shape
        own = {
            part: adapter.norms[f"{name}.{part}"].to(dtype).view(shape)
            for part in ("weight", "bias")
            if f"{name}.{part}" in adapter.norms
        }
        weight, bias = base.norm_tensors[name]
        norms[name] = norm_part(
            architecture.norm,
            own.get("weight", weight),
            own.get("bias", bias),
            base.backend,
            name,
        )
        tensors += own.values()
    if embedding is None and head is None and not norms and known is None:
        return None
    return StagedEnds(embedding, head, norms, tuple(t for t in tensors if t is not None), known)


def _without_base(change: MatrixChange, base: Tensor | DenseWeight | PackedWeight) -> MatrixChange:
    """The change without what it was trained on, if that is what the base has."""
    if change.base is None:
        return change
    if isinstance(base, DenseWeight):
        base = base.weight
    same = isinstance(base, Tensor) and torch.equal(change.base.to(base.dtype), base)
    return replace(change, base=None) if same or change.whole is not None else change


def _as_rows(change: MatrixChange, base: Tensor | DenseWeight | PackedWeight) -> MatrixChange:
    """The change with single rows instead of a matrix, if most of its rows are the base's."""
    if change.matrix is None or isinstance(base, PackedWeight):
        return change
    known = base.weight if isinstance(base, DenseWeight) else base
    matrix = change.matrix.to(known.dtype)
    if change.ids is not None and change.rows is not None:
        matrix = matrix.index_copy(0, change.ids, change.rows.to(known.dtype))
    both = min(len(matrix), len(known))
    differs = torch.ones(len(matrix), dtype=torch.bool)
    differs[:both] = (matrix[:both] != known[:both]).any(dim=1)
    ids = differs.nonzero()[:, 0]
    if len(ids) > len(matrix) // 2:
        return change
    return replace(change, base=None, whole=None, ids=ids, rows=matrix[ids])


def _staged_embedding(
    change: MatrixChange, backend: Backend, dtype: torch.dtype, *, in_8_bits: bool
) -> _Embedding:
    table = low_rank = None
    if (module := change.low_rank) is not None:
        # The kernel takes what is shrunk already: its first matrix is the identity.
        table = module.b.to(dtype)
        expand = (module.a.float() * module.scale).T
        low_rank = _LowRank.of(torch.eye(module.rank), expand, dtype, backend)
    matrix: Tensor | _Rounded | None = None
    if change.matrix is not None:
        matrix = change.matrix.to(dtype)
        if in_8_bits:
            matrix = _Rounded(*rounded_rows(matrix), dtype)
    rows = None if change.rows is None else change.rows.to(dtype)
    return _Embedding(matrix, change.ids, rows, table, low_rank)


def _staged_head(
    change: MatrixChange, base: BaseModel, dtype: torch.dtype, rows: int, *, in_8_bits: bool
) -> _Head:
    def dense(matrix: Tensor | None) -> DenseWeight | None:
        return None if matrix is None else DenseWeight(matrix.to(dtype))

    def kernel(weight: Weight | None) -> LinearKernel | None:
        return None if weight is None else base.backend.linear(weight, dtype)

    outputs = low_rank = None
    if (module := change.low_rank) is not None:
        outputs = _outputs(module, dense(change.matrix) or base.head)
        b = module.b.float() * module.scale
        if outputs is not None:
            b *= 1 + outputs[0, :, None]
        low_rank = _LowRank.of(module.a, b, dtype, base.backend)
    change = _as_rows(change, base.head)
    some = dense(change.rows)
    whole: Weight | None = dense(change.matrix)
    if in_8_bits and isinstance(whole, DenseWeight):
        rounded = round_to_int8(whole.weight, math.gcd(whole.in_features, _GROUP_SIZE))
        whole = rounded.to_layout(preferred_layout(rounded.qweight.device))
    tensors = [tensor for weight in (whole, some) for tensor in _tensors_of(weight)]
    tensors += [each for each in (change.ids, outputs) if each is not None]
    tensors += () if low_rank is None else low_rank.tensors
    return _Head(kernel(whole), change.ids, kernel(some), outputs, low_rank, rows, tensors)


def _tensors_of(weight: Weight | None) -> Iterator[Tensor]:
    if isinstance(weight, DenseWeight):
        yield weight.weight
    elif weight is not None:
        yield from (each for each in vars(weight).values() if isinstance(each, Tensor))


def _outputs(module: LoRAModule, weight: DenseWeight | PackedWeight) -> Tensor | None:
    if module.is_low_rank:
        return None
    return BaseLayers((weight,), (0, len(module.b))).gains_and_shifts(0, module)
