"""Adapter weights on the device, in a fixed number of slots which the kernels read.

Every projection of every layer has one buffer over all slots. It is zero if the adapter in a slot
does not change that projection. The experts of a mixture have one buffer together, in which slot
``s`` of expert ``e`` is number ``e · count + s``. An adapter is *staged* in host memory in the same
layout, so that filling a slot is only a copy.

An adapter may also change biases, and with DoRA the length of each row of the merged weight. With
``m`` the magnitudes over the norms of ``W + scale · B·A``, ``c`` the base's bias and ``c'`` the
adapter's, DoRA computes

    m · (W·x + scale · B·A·x) + c'  =  y + (m − 1) · y + (c' − m · c) + m · scale · B·A·x

from the base's output ``y = W·x + c``. (IA)³ has ``m`` itself, and ``m · c`` for ``c'``. So such an
adapter has a *gain* ``m − 1`` and a *shift*
``c' − m · c`` for every output, and ``m`` is part of ``B``. The norms are computed once, when the
adapter is staged, from the base's weights as they are served, some rows at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nybble.engine.adapter_ends import StagedEnds, StepEnds, stage_ends
from nybble.engine.base_layers import BaseLayers, BaseModel
from nybble.engine.parallel import ALONE, Range, TensorParallel, length
from nybble.engine.transfer import send
from nybble.kernels.backend import Backend
from nybble.kernels.lora import slot_buffers
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.reference import stretch_add
from nybble.loaders import AdapterError, LoRAAdapter
from nybble.loaders.adapter_combine import kind_of
from nybble.models import Architecture, Mixture


@dataclass(frozen=True)
class ProjectionSlots:
    """The buffers of one (fused) projection; see :mod:`nybble.kernels.lora` for their shapes.

    all_offsets: ``offsets`` of all ranks' outputs, of which ``own`` are this rank's.
    outputs: gains and shifts, float32 ``(2, out)``, of the slots that have any.
    """

    modules: tuple[str, ...]
    a: Tensor
    b: Tensor
    ranks: Tensor
    offsets: tuple[int, ...]
    all_offsets: tuple[int, ...]
    own: tuple[Range, ...]
    outputs: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertSlots:
    """The buffers of a layer's experts: of their gate and up, and of their down projections."""

    up: ProjectionSlots
    down: ProjectionSlots


@dataclass(frozen=True)
class ExpertAdapters:
    """The adapters on a layer's experts, for rows that were routed.

    batch: of all rows and their experts, ``rows · top_k`` entries.
    """

    slots: ExpertSlots
    batch: LoRABatch
    backend: Backend

    def add_up(self, out: Tensor, x: Tensor) -> None:
        """Add to ``out (rows, top_k, …)``, in place, for ``x (rows, in)``."""
        each = x.unsqueeze(1).expand(*out.shape[:2], -1)
        self._add(self.slots.up, out, each.reshape(-1, x.shape[-1]))

    def add_down(self, out: Tensor, x: Tensor) -> None:
        """Add to ``out (rows, top_k, …)``, in place, for ``x (rows, top_k, in)``."""
        self._add(self.slots.down, out, x.flatten(0, 1))

    def _add(self, slots: ProjectionSlots, out: Tensor, x: Tensor) -> None:
        rows, buffers = out.view(len(x), -1), (slots.a, slots.b, slots.ranks, slots.offsets)
        self.backend.lora_add(rows, x, *buffers, self.batch)


@dataclass(frozen=True)
class StepAdapters:
    """What one step needs to apply adapters.

    projections: the buffers, in the order in which the model computes them.
    experts: those of layers with experts; empty if no adapter in a slot changes an expert.
    count: of slots.
    batch: which slot each row uses.
    stretched: the slots whose adapters have gains and shifts, with the rows that use them.
    ends: what adapters change of the embedding, the output layer and norms; None if nothing.
    """

    projections: Sequence[ProjectionSlots]
    experts: Mapping[int, ExpertSlots]
    count: int
    batch: LoRABatch
    backend: Backend
    stretched: Sequence[tuple[int, Tensor]] = ()
    ends: StepEnds | None = None

    def on_experts(self, layer: int, expert_ids: Tensor) -> ExpertAdapters | None:
        """The adapters of rows with these experts, ``(rows, top_k)``; None if there are none."""
        if layer not in self.experts:
            return None
        slots = self.batch.slots[:, None]
        each = torch.where(slots < 0, -1, expert_ids * self.count + slots)
        batch = LoRABatch.of(each.flatten().tolist(), each.device)
        return None if batch is None else ExpertAdapters(self.experts[layer], batch, self.backend)

    def by_slot(self, projection: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """The adapters that change a projection of one linear layer, one after the other.

        Each with the rows that use it, int64; its ``a (rank, in)`` and ``b (out, rank)``; and its
        gains and shifts, None if it has neither.
        """
        slots = self.projections[projection]
        ranks = {slot: rank for slot, rank in enumerate(slots.ranks.tolist()) if rank}
        for slot, rows in self.batch.rows_by_slot(ranks):
            rank = ranks[slot]
            b = slots.b[slot, :, :rank]
            yield rows, slots.a[slot, :rank], b, slots.outputs.get(slot)

    def add(self, projection: int, out: Tensor, x: Tensor) -> None:
        """Add the adapters' part to ``out``, in place.

        projection: index of the projection whose output for ``x`` is ``out``.
        """
        slots = self.projections[projection]
        for slot, rows in self.stretched:
            if slot in slots.outputs:
                stretch_add(out, rows, *slots.outputs[slot])
        self.backend.lora_add(out, x, slots.a, slots.b, slots.ranks, slots.offsets, self.batch)


@dataclass(frozen=True)
class StagedProjection:
    """What an adapter does to one projection.

    a: ``(parts, rank, in)``.
    b: ``(rank, out)``, multiplied by α/r and, with DoRA, by 1 + gain.
    outputs: gains and shifts, float32 ``(2, out)``; None if it has neither.
    """

    a: Tensor
    b: Tensor
    outputs: Tensor | None

    def is_finite(self) -> bool:
        parts = (self.a, self.b) if self.outputs is None else (self.a, self.b, self.outputs)
        return all(bool(part.isfinite().all()) for part in parts)


@dataclass(frozen=True)
class StagedAdapter:
    """An adapter in host memory, ready to be copied into a slot.

    projections: in the order of the layers; None for one that the adapter does not change.
    nbytes: size in host memory.
    memory: ``(numbers,)``, which holds all but their ``outputs``.
    ends: what it changes of the embedding, the output layer and norms, which its slot refers to;
        None if nothing.
    """

    projections: Sequence[StagedProjection | None]
    nbytes: int
    memory: Tensor = field(default_factory=lambda: torch.empty(0))
    ends: StagedEnds | None = None

    @property
    def ranks(self) -> list[int | None]:
        """The rank of each projection's change; None for one that is not changed."""
        return [None if each is None else len(each.b) for each in self.projections]

    def is_finite(self) -> bool:
        """Whether no value overflowed in the slots' dtype."""
        return all(each is None or each.is_finite() for each in (*self.projections, self.ends))


class AdapterSlots:
    """``count`` slots for adapters of rank up to ``max_rank``.

    projections: the buffers of each group of linear layers, in the order of computation.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        count: int,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype,
        base: BaseModel | None = None,
        group: TensorParallel = ALONE,
    ) -> None:
        """base: what DoRA, trained biases and changes outside of the projections need
        (:attr:`nybble.engine.decoder.Decoder.base`).
        group: which rank this is. Adapters are staged for all ranks, and cut when a slot is filled.
        """
        self.architecture = architecture
        self._group = group
        outputs = group.outputs(architecture)
        self._base = base
        self.count = count
        self.max_rank = max_rank
        self.device = device
        self.dtype = dtype
        groups = [
            (index, group)
            for index, layer in enumerate(architecture.layers)
            for group in layer.groups
        ]
        dense = len(groups)
        mixtures = {
            index: layer.mlp
            for index, layer in enumerate(architecture.layers)
            # A GPU has no kernel for adapters on experts, and slots would take much memory.
            if isinstance(layer.mlp, Mixture) and device.type == "cpu"
        }
        for index, mixture in mixtures.items():
            groups += [(index, expert.up) for expert in mixture.experts]
            groups += [(index, expert.down) for expert in mixture.experts]
        # One tensor for all ranks, so that filling a slot writes them in one copy.
        self._ranks = torch.zeros(len(groups), count, dtype=torch.int32, device=device)
        self._rank_of = [[0] * count for _ in groups]
        # The experts' follow those of the projections; groups of one kind lie together.
        self.projections: list[ProjectionSlots] = []
        self._experts: dict[int, ExpertSlots] = {}
        self._first_of_experts = dense
        self._on_experts: set[int] = set()  # slots of adapters that change any
        self._stretched: set[int] = set()  # slots of adapters that have gains and shifts
        self._ends: dict[int, StagedEnds] = {}  # by slot

        def together(first: int, number: int) -> ProjectionSlots:
            """The buffers of so many groups of one shape; each group's own is a view of them."""
            index, group = groups[first]
            all_offsets = (0, *itertools.accumulate(linear.out for linear in group.linears))
            parts = [
                outputs.get(architecture.module(index, linear.name), [(0, linear.out)])
                for linear in group.linears
            ]
            offsets = (0, *itertools.accumulate(map(length, parts)))
            own = tuple(outputs.get(architecture.module(index, group.name), [(0, group.out)]))
            a, b = slot_buffers(number * count, max_rank, group.inputs, offsets, dtype, device)
            ranks = self._ranks[first : first + number]
            for place, (layer, one) in enumerate(groups[first : first + number]):
                modules = tuple(architecture.module(layer, linear.name) for linear in one.linears)
                at = slice(place * count, (place + 1) * count)
                self.projections.append(
                    ProjectionSlots(modules, a[at], b[at], ranks[place], offsets, all_offsets, own)
                )
            return ProjectionSlots((), a, b, ranks.view(-1), offsets, all_offsets, own)

        for first in range(dense):
            together(first, 1)
        for index, mixture in mixtures.items():
            first, experts = len(self.projections), len(mixture.experts)
            up = together(first, experts)
            self._experts[index] = ExpertSlots(up, together(first + experts, experts))

    def for_step(self, batch: LoRABatch, backend: Backend) -> StepAdapters:
        """What a step of these rows needs."""
        experts = self._experts if self._on_experts else {}
        stretched = batch.rows_by_slot(self._stretched) if self._stretched else ()
        ends = None
        if self._ends and (rows := batch.rows_by_slot(self._ends)):
            ends = StepEnds([(self._ends[slot], own) for slot, own in rows])
        return StepAdapters(self.projections, experts, self.count, batch, backend, stretched, ends)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together.

        Those of experts are many. On the CPU they take memory once they are filled.
        """
        return sum(each.a.nbytes + each.b.nbytes for each in self.projections)

    def stage(self, adapter: LoRAAdapter) -> StagedAdapter:
        """Copy an adapter to host memory in the slots' layout; pinned if the device is a GPU.

        Raises AdapterError for an adapter on experts, with DoRA, (IA)³ or biases if the device is a
        GPU, and with DoRA, (IA)³ or biases if there are several ranks. Nor can it change the
        embedding, the output layer or norms then.
        """
        known = {name for slots in self.projections for name in slots.modules}
        for name in adapter.modules:
            if name not in known:
                raise AdapterError(
                    f"the adapter changes {name}, an expert of a mixture, which a GPU does not "
                    "compute so far; train an adapter on attention, or use --device cpu"
                )
        if self.device.type != "cpu" and (kind := _stretching(adapter)):
            raise AdapterError(
                f"the adapter has {kind}, which a GPU does not compute so far; merge the adapter "
                "into its base, or use --device cpu"
            )
        if self._group.size > 1 and (kind := _stretching(adapter)):
            raise AdapterError(
                f"the adapter has {kind}, which tensor parallelism does not compute so far; merge "
                "the adapter into its base, or serve it with one rank"
            )
        found: list[int | None] = []
        for slots in self.projections:
            present = [adapter.modules[m] for m in slots.modules if m in adapter.modules]
            found.append(max(module.rank for module in present) if present else None)
        memory = torch.zeros(
            self.staged_size(found), dtype=self.dtype, pin_memory=self.device.type == "cuda"
        )
        staged = list(self.views(memory, found).projections)
        for index, (slots, change) in enumerate(zip(self.projections, staged, strict=True)):
            if change is None:
                continue
            changes = {n: adapter.modules[n] for n in slots.modules if n in adapter.modules}
            vectors, b = None, change.b
            if not all(module.is_low_rank for module in changes.values()):
                vectors = torch.zeros(2, slots.offsets[-1])
                assert self._base is not None
                layers = BaseLayers(self._base.projections[index], slots.offsets)
            for part, name in enumerate(slots.modules):
                module = changes.get(name)
                if module is None:
                    continue
                columns = slice(slots.all_offsets[part], slots.all_offsets[part + 1])
                change.a[part, : module.rank] = module.a
                scaled = module.b.float() * module.scale
                if vectors is not None and not module.is_low_rank:
                    vectors[:, columns] = layers.gains_and_shifts(part, module)
                    scaled *= 1 + vectors[0, columns, None]
                b[: module.rank, columns] = scaled.T
            staged[index] = replace(change, outputs=vectors)
        ends = None
        if _changes_ends(adapter):
            assert self._base is not None
            ends = stage_ends(adapter, self.architecture, self._base, self.dtype)
        beside = (*(each.outputs for each in staged if each is not None), ends)
        nbytes = memory.nbytes + sum(each.nbytes for each in beside if each is not None)
        return StagedAdapter(staged, nbytes, memory, ends)

    def staged_size(self, ranks: Sequence[int | None]) -> int:
        """Numbers of an adapter whose changes of the projections have these ranks."""
        return sum(
            (rank or 0) * (len(slots.modules) * slots.a.shape[2] + slots.all_offsets[-1])
            for slots, rank in zip(self.projections, ranks, strict=True)
        )

    def views(self, memory: Tensor, ranks: Sequence[int | None]) -> StagedAdapter:
        """An adapter in ``memory``, as it is laid out for changes of these ranks."""
        staged: list[StagedProjection | None] = []
        at = 0
        for slots, rank in zip(self.projections, ranks, strict=True):
            if rank is None:
                staged.append(None)
                continue
            parts, inputs, outputs = len(slots.modules), slots.a.shape[2], slots.all_offsets[-1]
            middle, end = at + parts * rank * inputs, at + rank * (parts * inputs + outputs)
            a = memory[at:middle].view(parts, rank, inputs)
            staged.append(StagedProjection(a, memory[middle:end].view(rank, outputs), None))
            at = end
        return StagedAdapter(staged, memory.nbytes, memory)

    def clear(self, slot: int) -> None:
        """Let go of what a slot refers to in host memory. Its buffers are left as they are."""
        self._ends.pop(slot, None)

    def fill(self, slot: int, staged: StagedAdapter) -> None:
        """Copy an adapter into a slot, overwriting it. Kernels launched later see the new one."""
        ranks: list[int] = []
        self._stretched.discard(slot)
        self._ends.pop(slot, None)
        if staged.ends is not None:
            self._ends[slot] = staged.ends
        for index, (slots, change) in enumerate(
            zip(self.projections, staged.projections, strict=True)
        ):
            slots.outputs.pop(slot, None)
            a = slots.a[slot].view(len(slots.modules), self.max_rank, -1)
            b = slots.b[slot].T
            rank = 0
            if change is not None:
                rank = change.b.shape[0]
                a[:, :rank].copy_(change.a, non_blocking=True)
                own = [change.b[:, first:last] for first, last in slots.own]
                b[:rank].copy_(own[0] if len(own) == 1 else torch.cat(own, 1), non_blocking=True)
                if change.outputs is not None:
                    slots.outputs[slot] = change.outputs
                    self._stretched.add(slot)
            before = self._rank_of[index][slot]
            if not rank and not before:
                ranks.append(0)
                continue
            if before > rank:
                a[:, rank:before].zero_()
                b[rank:before].zero_()
            self._rank_of[index][slot] = rank
            ranks.append(rank)
        if any(ranks[self._first_of_experts :]):
            self._on_experts.add(slot)
        else:
            self._on_experts.discard(slot)
        self._ranks[:, slot] = send(ranks, torch.int32, self.device)


def _changes_ends(adapter: LoRAAdapter) -> bool:
    return bool(adapter.embedding or adapter.head or adapter.norms)


def _stretching(adapter: LoRAAdapter) -> str | None:
    """What the adapter has beside low-rank changes of projections; None if nothing."""
    if _changes_ends(adapter):
        return "changes of embeddings, the output layer or norms"
    other = [each for each in adapter.modules.values() if not each.is_low_rank]
    # Those that stretch first: DoRA may be beside biases.
    return kind_of(max(other, key=lambda each: each.stretches)) if other else None
