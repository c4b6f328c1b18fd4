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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble.engine.base_layers import BaseLayers, BaseModel
from nybble.engine.parallel import Range, TensorParallel, joined
from nybble.engine.parts import NormPart
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
class RoundedRows:
    """A matrix in 8 bits, whose rows are looked up.

    codes: int8 ``(rows, columns)``. scales: float32 ``(rows,)``.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __getitem__(self, rows: Tensor) -> Tensor:
        return (self.codes[rows].float() * self.scales[rows, None]).to(self.dtype)


@dataclass(frozen=True)
class MatrixTensors:
    """What the embedding or the output layer of an adapter is computed with, in its dtype.

    matrix: ``(vocab, hidden)``, instead of the base's.
    ids, rows: int64 ``(n,)``, ascending, and ``(n, hidden)``, instead of the rows of these tokens.
    a, b: what is multiplied and added. Of the embedding ``(vocab, rank)``, which ``(hidden, rank)``
        expands; of the output layer ``(rank, hidden)`` and ``(vocab, rank)``.
    outputs: gains and shifts, float32 ``(2, vocab)``, as of projections (DoRA and biases).
    """

    matrix: Tensor | None = None
    ids: Tensor | None = None
    rows: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    outputs: Tensor | None = None

    def of_tokens(self, first: int, last: int) -> MatrixTensors:
        """Of an output layer, what these tokens need."""
        ids, rows = self.ids, self.rows
        if ids is not None and rows is not None:
            start, stop = torch.searchsorted(ids, torch.tensor([first, last])).tolist()
            ids, rows = ids[start:stop] - first, rows[start:stop]
            if start == stop:
                ids = rows = None
        return replace(
            self,
            matrix=None if self.matrix is None else self.matrix[first:last],
            ids=ids,
            rows=rows,
            b=None if self.b is None else self.b[first:last],
            outputs=None if self.outputs is None else self.outputs[:, first:last].contiguous(),
        )


@dataclass(frozen=True)
class EndTensors:
    """What an adapter changes at the ends, of all ranks together; see :class:`StagedEnds`.

    norms: weights and biases of norms, by their names.
    rows: how many tokens the output layer has.
    """

    embedding: MatrixTensors | None
    head: MatrixTensors | None
    norms: Mapping[str, Tensor]
    rows: int
    known: int | None

    def map(self, function: Callable[[Tensor], Tensor]) -> EndTensors:
        """The same with what a function makes of each tensor, in an order that is always the same.

        The tensors it is given are contiguous.
        """

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor.contiguous())

        def of_matrix(tensors: MatrixTensors | None) -> MatrixTensors | None:
            if tensors is None:
                return None
            return MatrixTensors(**{name: of(tensor) for name, tensor in vars(tensors).items()})

        norms = {name: function(each.contiguous()) for name, each in self.norms.items()}
        embedding, head = of_matrix(self.embedding), of_matrix(self.head)
        return EndTensors(embedding, head, norms, self.rows, self.known)

    @property
    def tensors(self) -> Sequence[Tensor]:
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(keep)
        return found


@dataclass(frozen=True)
class _Embedding:
    """See :class:`MatrixTensors`.

    table: ``(vocab, rank)``, what ``low_rank`` expands for each token; both None without LoRA.
    """

    matrix: Tensor | RoundedRows | None
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
        if isinstance(self.matrix, RoundedRows):
            yield from (self.matrix.codes, self.matrix.scales)
        else:
            yield self.matrix
        if self.low_rank is not None:
            yield from self.low_rank.tensors


@dataclass(frozen=True)
class _Head:
    """The output layer, of which each rank computes some tokens; see :class:`MatrixTensors`.

    whole, some: compute the logits of all of them, or of ``ids``, instead of the base's.
    outputs: gains and shifts.
    first, last: this rank's tokens. rows: how many tokens all ranks have logits for.
    tensors: what these hold.
    """

    whole: LinearKernel | None
    ids: Tensor | None
    some: LinearKernel | None
    outputs: Tensor | None
    low_rank: _LowRank | None
    first: int
    last: int
    rows: int
    group: TensorParallel
    tensors: Sequence[Tensor | None]

    def __call__(self, x: Tensor, base: Tensor) -> Tensor:
        """The logits of normed hidden states, of which the base's are ``base``.

        Those have as many columns at least. All ranks compute it together.
        """
        return self.group.gathered_head(self._own, self.rows)(x, base)

    def _own(self, x: Tensor, base: Tensor) -> Tensor:
        out = base[:, self.first : self.last].contiguous() if self.whole is None else self.whole(x)
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
    whole: of all ranks together, for the others; None if there are none.
    """

    embedding: _Embedding | None
    head: _Head | None
    norms: Mapping[str, NormPart]
    tensors: tuple[Tensor, ...]
    known: int | None = None
    whole: EndTensors | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        whole = () if self.whole is None else self.whole.tensors
        # Most of what this rank computes with are parts of those.
        there = {each.untyped_storage().data_ptr() for each in whole}
        own = (each for each in self.tensors if each.untyped_storage().data_ptr() not in there)
        return sum(each.nbytes for each in (*whole, *own))

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


def end_tensors(
    adapter: LoRAAdapter,
    architecture: Architecture,
    base: BaseModel,
    dtype: torch.dtype,
    known: int | None = None,
) -> EndTensors | None:
    """What the adapter changes at the ends, in ``dtype``; None if nothing.

    known: one more than the highest token that it knows; None for what the base knows.
    """
    embedding = head = None
    if (change := adapter.embedding) is not None:
        embedding = _of_embedding(kept_change(change, base.embedding), dtype)
    if (change := adapter.head) is not None:
        head = _of_head(_without_base(change, base.head), base, dtype)
    norms = {name: each.to(dtype) for name, each in adapter.norms.items()}
    if embedding is None and head is None and not norms and known is None:
        return None
    return EndTensors(embedding, head, norms, adapter.vocab or architecture.vocab, known)


def stage_ends(
    whole: EndTensors,
    base: BaseModel,
    dtype: torch.dtype,
    group: TensorParallel,
    outputs: Mapping[str, Sequence[Range]],
    *,
    in_8_bits: bool = False,
) -> StagedEnds:
    """What this rank computes.

    base, outputs: this rank's; see :meth:`TensorParallel.outputs`.
    in_8_bits: whether whole matrices are rounded to 8 bits.
    """
    backend = base.backend
    embedding = head = None
    tensors: list[Tensor | None] = []
    if whole.embedding is not None:
        embedding = _staged_embedding(whole.embedding, backend, dtype, in_8_bits=in_8_bits)
        tensors += embedding.tensors
    if whole.head is not None:
        head = _staged_head(whole.head, backend, dtype, whole.rows, group, in_8_bits=in_8_bits)
        tensors += head.tensors
    norms = {}
    for module in dict.fromkeys(each.rpartition(".")[0] for each in whole.norms):
        weight, bias = base.norm_tensors[module]
        weight = _of_norm(whole, f"{module}.weight", weight, outputs)
        if bias is not None:
            bias = _of_norm(whole, f"{module}.bias", bias, outputs)
        norms[module] = base.norm(module, weight, bias)
        tensors += weight, bias
    found = tuple(tensor for tensor in tensors if tensor is not None)
    sent = whole if group.size > 1 and group.rank == 0 else None
    return StagedEnds(embedding, head, norms, found, whole.known, sent)


def _of_norm(
    whole: EndTensors, name: str, own: Tensor, outputs: Mapping[str, Sequence[Range]]
) -> Tensor:
    """What an adapter has instead of this rank's tensor of a norm, or that tensor."""
    if name not in whole.norms:
        return own
    changed = whole.norms[name].view(-1, *own.shape[1:])
    return joined(changed, outputs[name]) if name in outputs else changed


def kept_change(change: MatrixChange, base: Tensor | DenseWeight | PackedWeight) -> MatrixChange:
    """What is kept of a change of the embedding, or of an output layer without LoRA.

    base: the matrix that it changes.
    """
    return _as_rows(_without_base(change, base), base)


def rounded_embedding(matrix: Tensor, dtype: torch.dtype) -> RoundedRows:
    """A whole embedding ``(vocab, hidden)`` in 8 bits, whose rows are in ``dtype``."""
    return RoundedRows(*rounded_rows(matrix), dtype)


def rounded_head(matrix: Tensor) -> PackedWeight:
    """A whole output layer ``(vocab, hidden)`` in 8 bits."""
    return round_to_int8(matrix, math.gcd(matrix.shape[1], _GROUP_SIZE))


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


def _of_embedding(change: MatrixChange, dtype: torch.dtype) -> MatrixTensors:
    a = b = None
    if (module := change.low_rank) is not None:
        a = module.b.to(dtype)
        b = (module.a.float() * module.scale).T.to(dtype)
    return MatrixTensors(_in(dtype, change.matrix), change.ids, _in(dtype, change.rows), a, b)


def _of_head(change: MatrixChange, base: BaseModel, dtype: torch.dtype) -> MatrixTensors:
    a = b = outputs = None
    if (module := change.low_rank) is not None:
        matrix = _in(dtype, change.matrix)
        outputs = _outputs(module, base.head if matrix is None else DenseWeight(matrix))
        b = module.b.float() * module.scale
        if outputs is not None:
            b *= 1 + outputs[0, :, None]
        a, b = module.a.to(dtype), b.to(dtype)
    change = _as_rows(change, base.head)
    matrix, rows = _in(dtype, change.matrix), _in(dtype, change.rows)
    return MatrixTensors(matrix, change.ids, rows, a, b, outputs)


def _in(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _staged_embedding(
    tensors: MatrixTensors, backend: Backend, dtype: torch.dtype, *, in_8_bits: bool
) -> _Embedding:
    low_rank = None
    if tensors.b is not None:
        # The kernel takes what is shrunk already: its first matrix is the identity.
        low_rank = _LowRank.of(torch.eye(tensors.b.shape[1]), tensors.b, dtype, backend)
    matrix: Tensor | RoundedRows | None = tensors.matrix
    if isinstance(matrix, Tensor) and in_8_bits:
        matrix = rounded_embedding(matrix, dtype)
    return _Embedding(matrix, tensors.ids, tensors.rows, tensors.a, low_rank)


def _staged_head(
    tensors: MatrixTensors,
    backend: Backend,
    dtype: torch.dtype,
    rows: int,
    group: TensorParallel,
    *,
    in_8_bits: bool,
) -> _Head:
    def dense(matrix: Tensor | None) -> DenseWeight | None:
        return None if matrix is None else DenseWeight(matrix)

    def kernel(weight: Weight | None) -> LinearKernel | None:
        return None if weight is None else backend.linear(weight, dtype)

    first, last = group.share(rows)
    own = tensors.of_tokens(first, last) if group.size > 1 else tensors
    if group.rank > 0 and own.matrix is not None:
        own = replace(own, matrix=own.matrix.clone())  # the others' part is not kept
    low_rank = None
    if own.a is not None and own.b is not None:
        low_rank = _LowRank.of(own.a, own.b, dtype, backend)
    some = dense(own.rows)
    whole: Weight | None = dense(own.matrix)
    if in_8_bits and isinstance(whole, DenseWeight):
        rounded = rounded_head(whole.weight)
        whole = rounded.to_layout(preferred_layout(rounded.qweight.device))
    held = [tensor for weight in (whole, some) for tensor in _tensors_of(weight)]
    held += [each for each in (own.ids, own.outputs) if each is not None]
    held += () if low_rank is None else low_rank.tensors
    return _Head(
        kernel(whole), own.ids, kernel(some), own.outputs, low_rank, first, last, rows, group, held
    )


def _tensors_of(weight: Weight | None) -> Iterator[Tensor]:
    if isinstance(weight, DenseWeight):
        yield weight.weight
    elif weight is not None:
        yield from (each for each in vars(weight).values() if isinstance(each, Tensor))


def _outputs(module: LoRAModule, weight: DenseWeight | PackedWeight) -> Tensor | None:
    if module.is_low_rank:
        return None
    return BaseLayers((weight,), (0, len(module.b))).gains_and_shifts(0, module)
