"""Adapter weights on the device, in a fixed number of slots which the kernels read.

Every projection of every layer has one buffer over all slots. It is zero if the adapter in a slot
does not change that projection. The experts of a mixture have one buffer together, in which slot
``s`` of expert ``e`` is number ``e · count + s``. An adapter is *staged* in host memory in the same
layout, so that filling a slot is only a copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.engine.transfer import send
from nybble.kernels.backend import Backend
from nybble.kernels.lora import slot_buffers
from nybble.kernels.lora_batch import LoRABatch
from nybble.loaders import AdapterError, LoRAAdapter
from nybble.models import Architecture, Mixture


@dataclass(frozen=True)
class ProjectionSlots:
    """The buffers of one (fused) projection; see :mod:`nybble.kernels.lora` for their shapes."""

    modules: tuple[str, ...]
    a: Tensor
    b: Tensor
    ranks: Tensor
    offsets: tuple[int, ...]


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
    """

    projections: Sequence[ProjectionSlots]
    experts: Mapping[int, ExpertSlots]
    count: int
    batch: LoRABatch
    backend: Backend

    def on_experts(self, layer: int, expert_ids: Tensor) -> ExpertAdapters | None:
        """The adapters of rows with these experts, ``(rows, top_k)``; None if there are none."""
        if layer not in self.experts:
            return None
        slots = self.batch.slots[:, None]
        each = torch.where(slots < 0, -1, expert_ids * self.count + slots)
        batch = LoRABatch.of(each.flatten().tolist(), each.device)
        return None if batch is None else ExpertAdapters(self.experts[layer], batch, self.backend)

    def add(self, projection: int, out: Tensor, x: Tensor) -> None:
        """Add the adapters' part to ``out``, in place.

        projection: index of the projection whose output for ``x`` is ``out``.
        """
        slots = self.projections[projection]
        self.backend.lora_add(out, x, slots.a, slots.b, slots.ranks, slots.offsets, self.batch)


@dataclass(frozen=True)
class StagedAdapter:
    """An adapter in host memory, ready to be copied into a slot.

    projections: for each projection, in the order of the layers, a ``(parts, rank, in)`` and
        b ``(rank, out)``, the latter scaled by α/r; None if the adapter does not change it.
    nbytes: size in host memory.
    """

    projections: Sequence[tuple[Tensor, Tensor] | None]
    nbytes: int

    def is_finite(self) -> bool:
        """Whether no value overflowed in the slots' dtype."""
        pairs = (pair for pair in self.projections if pair is not None)
        return all(bool(part.isfinite().all()) for pair in pairs for part in pair)


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
    ) -> None:
        self.architecture = architecture
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

        def together(first: int, number: int) -> ProjectionSlots:
            """The buffers of so many groups of one shape; each group's own is a view of them."""
            _, group = groups[first]
            offsets = (0, *itertools.accumulate(linear.out for linear in group.linears))
            a, b = slot_buffers(number * count, max_rank, group.inputs, offsets, dtype, device)
            ranks = self._ranks[first : first + number]
            for place, (index, each) in enumerate(groups[first : first + number]):
                modules = tuple(architecture.module(index, linear.name) for linear in each.linears)
                own = slice(place * count, (place + 1) * count)
                self.projections.append(
                    ProjectionSlots(modules, a[own], b[own], ranks[place], offsets)
                )
            return ProjectionSlots((), a, b, ranks.view(-1), offsets)

        for first in range(dense):
            together(first, 1)
        for index, mixture in mixtures.items():
            first, experts = len(self.projections), len(mixture.experts)
            up = together(first, experts)
            self._experts[index] = ExpertSlots(up, together(first + experts, experts))

    def for_step(self, batch: LoRABatch, backend: Backend) -> StepAdapters:
        """What a step of these rows needs."""
        experts = self._experts if self._on_experts else {}
        return StepAdapters(self.projections, experts, self.count, batch, backend)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together.

        Those of experts are many. On the CPU they take memory once they are filled.
        """
        return sum(each.a.nbytes + each.b.nbytes for each in self.projections)

    def stage(self, adapter: LoRAAdapter) -> StagedAdapter:
        """Copy an adapter to host memory in the slots' layout; pinned if the device is a GPU.

        Raises AdapterError for an adapter on experts if the device is a GPU.
        """
        known = {name for slots in self.projections for name in slots.modules}
        for name in adapter.modules:
            if name not in known:
                raise AdapterError(
                    f"the adapter changes {name}, an expert of a mixture, which a GPU does not "
                    "compute so far; train an adapter on attention, or use --device cpu"
                )
        plans: list[tuple[ProjectionSlots, int, int] | None] = []
        total = 0
        for slots in self.projections:
            present = [adapter.modules[m] for m in slots.modules if m in adapter.modules]
            rank = max((module.rank for module in present), default=0)
            plans.append((slots, rank, total) if present else None)
            total += rank * (len(slots.modules) * slots.a.shape[2] + slots.offsets[-1])
        memory = torch.zeros(total, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        staged: list[tuple[Tensor, Tensor] | None] = []
        for plan in plans:
            if plan is None:
                staged.append(None)
                continue
            slots, rank, at = plan
            parts, inputs, outputs = len(slots.modules), slots.a.shape[2], slots.offsets[-1]
            middle, end = at + parts * rank * inputs, at + rank * (parts * inputs + outputs)
            a = memory[at:middle].view(parts, rank, inputs)
            b = memory[middle:end].view(rank, outputs)
            for part, name in enumerate(slots.modules):
                module = adapter.modules.get(name)
                if module is not None:
                    a[part, : module.rank] = module.a
                    scaled = (module.b.float() * module.scale).T
                    b[: module.rank, slots.offsets[part] : slots.offsets[part + 1]] = scaled
            staged.append((a, b))
        return StagedAdapter(staged, memory.nbytes)

    def fill(self, slot: int, staged: StagedAdapter) -> None:
        """Copy an adapter into a slot, overwriting it. Kernels launched later see the new one."""
        ranks: list[int] = []
        for index, (slots, pair) in enumerate(
            zip(self.projections, staged.projections, strict=True)
        ):
            a = slots.a[slot].view(len(slots.modules), self.max_rank, -1)
            b = slots.b[slot].T
            rank = 0
            if pair is not None:
                rank = pair[1].shape[0]
                a[:, :rank].copy_(pair[0], non_blocking=True)
                b[:rank].copy_(pair[1], non_blocking=True)
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
