"""Adapters in slots, which the kernels read.

A slot refers to the matrices of one adapter: of every linear layer that it changes, as many rows as
its rank there. On the CPU these are the adapter's in host memory, where it was *staged*, so that
filling a slot copies nothing. They are copied on a GPU, whose memory for adapters is one buffer
(:mod:`nybble.engine.adapter_memory`), and if a process computes only some of the outputs.

An adapter may also change biases, and with DoRA the length of each row of the merged weight. With
``m`` the magnitudes over the norms of ``W + scale · B·A``, ``c`` the base's bias and ``c'`` the
adapter's, DoRA computes

    m · (W·x + scale · B·A·x) + c'  =  y + (m − 1) · y + (c' − m · c) + m · scale · B·A·x

from the base's output ``y = W·x + c``. (IA)³ has ``m`` itself, and ``m · c`` for ``c'``. So such an
adapter has a *gain* ``m − 1`` and a *shift* ``c' − m · c`` for every output, and ``m`` is part of
``B``. The norms are computed once, when the adapter is staged, from the base's weights as they are
served, some rows at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nybble.engine.adapter_ends import EndTensors, StagedEnds, StepEnds, end_tensors, stage_ends
from nybble.engine.adapter_layout import AdapterLayout
from nybble.engine.adapter_memory import AdapterMemory
from nybble.engine.base_layers import BaseLayers, BaseModel
from nybble.engine.parallel import ALONE, Range, TensorParallel, length
from nybble.engine.transfer import send
from nybble.kernels.backend import Backend
from nybble.kernels.cpu.huge_pages import empty_in_huge_pages
from nybble.kernels.lora import GroupedLoRA, LoRASlots, LowRank, Matrices, in_8_bits
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import Weight
from nybble.kernels.reference import stretch_add
from nybble.loaders import AdapterError, LoRAAdapter
from nybble.loaders.adapter_combine import kind_of
from nybble.models import Architecture, Mixture


@dataclass(frozen=True)
class ProjectionSlots:
    """The adapters on one (fused) projection.

    low_rank: of this rank's outputs, in the slots from ``first`` on.
    all_offsets: where the outputs of each layer begin, then their number, of all ranks together.
    own: which outputs of each layer are this rank's.
    outputs: gains and shifts, float32 ``(2, out)``, of the slots that have any.
    """

    modules: tuple[str, ...]
    low_rank: LoRASlots
    all_offsets: tuple[int, ...]
    own: tuple[tuple[Range, ...], ...]
    first: int = 0
    outputs: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertSlots:
    """The adapters on a layer's experts: on their gate and up, and on their down projections.

    Slot ``s`` of expert ``e`` is number ``e · count + s``.
    """

    up: LoRASlots
    down: LoRASlots


@dataclass(frozen=True)
class ExpertAdapters:
    """The adapters on a layer's experts, for rows that were routed.

    add: to the outputs ``(rows, top_k, …)`` of their experts.
    """

    slots: ExpertSlots
    add: GroupedLoRA

    def add_up(self, out: Tensor, x: Tensor) -> None:
        """Add to ``out (rows, top_k, …)``, in place, for ``x (rows, in)``."""
        self.add(out, x, self.slots.up)

    def add_down(self, out: Tensor, x: Tensor) -> None:
        """Add to ``out (rows, top_k, …)``, in place, for ``x (rows, top_k, in)``."""
        self.add(out, x, self.slots.down)


@dataclass(frozen=True)
class StepAdapters:
    """What one step needs to apply adapters.

    projections: in the order in which the model computes them.
    experts: those of layers with experts; empty if the step applies none.
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
        of_experts, slots = self.experts[layer], self.batch.slots[:, None]
        each = torch.where(slots < 0, -1, expert_ids * self.count + slots)
        add = self.backend.grouped_lora(each, len(of_experts.up.matrices))
        return None if add is None else ExpertAdapters(of_experts, add)

    def by_slot(self, projection: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """The adapters that change a projection of one linear layer, one after the other.

        Each with the rows that use it, int64; its ``a (rank, in)`` and ``b (out, rank)``; and its
        gains and shifts, None if it has neither.
        """
        slots = self.projections[projection]
        low_rank = slots.low_rank
        empty = Matrices(torch.empty(0, low_rank.inputs), torch.empty(0, low_rank.offsets[-1]))
        changed = {
            slot for slot, (pair,) in enumerate(low_rank.matrices) if pair is not None
        } | slots.outputs.keys()
        if not changed:  # as always on a GPU, which this would wait for
            return
        for slot, rows in self.batch.rows_by_slot(changed):
            pair = low_rank.matrices[slot][0] or empty
            a, b = pair[:2] if pair.scales is None else pair.wide()
            yield rows, a.to(low_rank.dtype), b.T.to(low_rank.dtype), slots.outputs.get(slot)

    def only_low_rank(self, projections: Sequence[int]) -> list[LoRASlots] | None:
        """Those on these projections; None if an adapter of the step changes layers otherwise."""
        if self.stretched or (self.ends is not None and self.ends.change_norms):
            return None
        return [self.projections[each].low_rank for each in projections]

    def add(self, projection: int, out: Tensor, x: Tensor) -> None:
        """Add the adapters' part to ``out``, in place.

        projection: index of the projection whose output for ``x`` is ``out``.
        """
        slots = self.projections[projection]
        for slot, rows in self.stretched:
            if slot in slots.outputs:
                stretch_add(out, rows, *slots.outputs[slot])
        self.backend.lora_add(out, x, slots.low_rank, self.batch)


@dataclass(frozen=True)
class StagedAdapter:
    """An adapter in memory, ready to be referred to by a slot.

    memory: its matrices, as :class:`nybble.engine.adapter_layout.AdapterLayout` lays them out;
        ``b`` is multiplied by α/r and, with DoRA, by 1 + gain.
    ranks: of the change of each linear layer, in their order; 0 for none.
    outputs: gains and shifts, float32 ``(2, out)``, by the index of the projection; of all ranks.
    ends: what it changes of the embedding, the output layer and norms, which its slot refers to;
        None if nothing.
    nbytes: of all of it.
    """

    memory: Tensor
    ranks: tuple[int, ...]
    outputs: Mapping[int, Tensor] = field(default_factory=dict)
    ends: StagedEnds | None = None

    @property
    def nbytes(self) -> int:
        found: int = self.memory.nbytes + sum(each.nbytes for each in self.outputs.values())
        return found + (0 if self.ends is None else self.ends.nbytes)


class AdapterSlots:
    """``count`` slots for adapters of rank up to ``max_rank``.

    projections: of each group of linear layers, in the order of computation.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        count: int,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype,
        device_bytes: int | None = None,
        base: BaseModel | None = None,
        whole: Callable[[], Sequence[tuple[Weight, ...]]] | None = None,
        group: TensorParallel = ALONE,
        in_8_bits: bool = False,
    ) -> None:
        """base: what DoRA, trained biases and changes outside of the projections need
        (:attr:`nybble.engine.decoder.Decoder.base`).
        device_bytes: a GPU's memory for adapters; None for ``count`` of the highest rank on all
        layers but experts.
        whole: the base's projections of all ranks, where adapters are staged; None: the base's.
        group: which rank this is. Adapters are staged for all ranks, and cut when a slot is filled.
        in_8_bits: whether the matrices of adapters are rounded to 8 bits, on the CPU.

        Raises ValueError if device_bytes do not hold one such adapter.
        """
        self.architecture = architecture
        self._group = group
        self._own_outputs = outputs = group.outputs(architecture)
        self._base = base
        self._whole = whole
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
            if isinstance(layer.mlp, Mixture)
        }
        for index, mixture in mixtures.items():
            groups += [(index, expert.up) for expert in mixture.experts]
            groups += [(index, expert.down) for expert in mixture.experts]
        # One table for all layers, so that filling a slot writes it in one copy.
        linears = sum(len(group.linears) for _, group in groups)
        self._table = torch.zeros(4, linears * count, dtype=torch.int64, device=device)
        # The experts' follow those of the projections; groups of one kind lie together.
        self.projections: list[ProjectionSlots] = []
        self._experts: dict[int, ExpertSlots] = {}
        self._first_of_experts = dense
        self._on_experts: set[int] = set()  # slots of adapters that change any
        self._stretched: set[int] = set()  # slots of adapters that have gains and shifts
        self._ends: dict[int, StagedEnds] = {}  # by slot
        starts: list[int] = []  # of each linear layer, where the first slot is in the table
        steps: list[int] = []  # and how far the next one is from it
        at = 0

        def together(first: int, number: int) -> LoRASlots:
            """The slots of so many groups of one shape, one group after the other."""
            nonlocal at
            index, group = groups[first]
            parts, end = len(group.linears), at + number * count * len(group.linears)
            own = tuple(
                tuple(outputs.get(architecture.module(index, linear.name), [(0, linear.out)]))
                for linear in group.linears
            )
            all_offsets = (0, *itertools.accumulate(linear.out for linear in group.linears))
            offsets = (0, *itertools.accumulate(map(length, own)))
            nothing: list[tuple[LowRank, ...]] = [(None,) * parts] * (number * count)
            table = self._table[:, at:end].view(4, number * count, parts)
            slots = LoRASlots(nothing, table, group.inputs, offsets, max_rank, dtype)
            for place, (layer, one) in enumerate(groups[first : first + number]):
                names = tuple(architecture.module(layer, linear.name) for linear in one.linears)
                self.projections.append(
                    ProjectionSlots(names, slots, all_offsets, own, place * count)
                )
                begin = at + place * count * parts
                starts.extend(range(begin, begin + parts))
                steps.extend([parts] * parts)
            at = end
            return slots

        for first in range(dense):
            together(first, 1)
        for index, mixture in mixtures.items():
            first, experts = len(self.projections), len(mixture.experts)
            up = together(first, experts)
            self._experts[index] = ExpertSlots(up, together(first + experts, experts))
        self._starts = torch.tensor(starts, device=device)
        self._steps = torch.tensor(steps, device=device)
        stored = torch.int8 if in_8_bits else dtype
        self.layout, self._own_layout = (
            AdapterLayout(list(self._shapes(own=own)), stored) for own in (False, True)
        )
        self._memory = None
        if device.type != "cpu":
            # Few adapters change experts, whose matrices are many times those of the other layers:
            # memory for them is only taken if it was asked for.
            most = [
                max_rank if place < dense else 0
                for place, slots in enumerate(self.projections)
                for _ in slots.modules
            ]
            largest = self._own_layout.size(most)
            numbers = count * largest if device_bytes is None else device_bytes // dtype.itemsize
            if numbers < largest:
                raise ValueError(
                    f"device_bytes is {device_bytes}, but an adapter of rank {max_rank} on all "
                    f"layers but experts takes {largest * dtype.itemsize}: raise it, or lower "
                    "max_rank"
                )
            self._memory = AdapterMemory(numbers, dtype, device)

    @property
    def change_experts(self) -> bool:
        """Whether an adapter in any slot changes an expert."""
        return bool(self._on_experts)

    def for_step(
        self, batch: LoRABatch, backend: Backend, *, on_experts: bool | None = None
    ) -> StepAdapters:
        """What a step of these rows needs.

        on_experts: whether adapters on experts are applied; None: if any slot has such a one.
        """
        if on_experts is None:
            on_experts = self.change_experts
        experts = self._experts if on_experts else {}
        stretched = batch.rows_by_slot(self._stretched) if self._stretched else ()
        ends = None
        if self._ends and (rows := batch.rows_by_slot(self._ends)):
            ends = StepEnds([(self._ends[slot], own) for slot, own in rows])
        return StepAdapters(self.projections, experts, self.count, batch, backend, stretched, ends)

    @property
    def free_bytes(self) -> int:
        """What a GPU's memory for adapters has left; 0 on the CPU, where slots take none."""
        return 0 if self._memory is None else self._memory.free * self.dtype.itemsize

    @property
    def device_bytes(self) -> int:
        """A GPU's memory for adapters; 0 on the CPU, where slots take none."""
        return 0 if self._memory is None else self._memory.size * self.dtype.itemsize

    def bytes_in(self, slot: int) -> int:
        """What of a GPU's memory for adapters a slot takes."""
        return 0 if self._memory is None else self._memory.length(slot) * self.dtype.itemsize

    def bytes_for(self, staged: StagedAdapter) -> int:
        """What of a GPU's memory for adapters a slot takes with this adapter in it."""
        if self._memory is None:
            return 0
        return self._own_layout.size(staged.ranks) * self.dtype.itemsize

    @property
    def refer_to_host(self) -> bool:
        """Whether slots refer to adapters in host memory, instead of having copies."""
        return self._memory is None and self._group.size == 1

    def stage(self, adapter: LoRAAdapter, known: int | None = None) -> StagedAdapter:
        """Copy an adapter to host memory, as slots refer to it; pinned if the device is a GPU.

        known: one more than the highest token that it knows; None for what the base knows. A GPU
            never samples others than the base knows.

        Raises AdapterError for an adapter on layers that latent attention absorbs, or with DoRA,
        (IA)³, biases or changes of the embedding, the output layer or norms, if the device is a
        GPU.
        """
        absorbed = self.architecture.computed_in_16_bits.keys() & adapter.modules.keys()
        if self.device.type != "cpu" and absorbed:
            raise AdapterError(
                f"the adapter changes {min(absorbed)}, which latent attention absorbs; a GPU does "
                "not compute that so far: train an adapter without it, or use --device cpu"
            )
        changed = "changes of embeddings, the output layer or norms"
        of_ends = changed if _changes_ends(adapter) else None
        if self.device.type != "cpu" and (kind := of_ends or _stretching(adapter)):
            raise AdapterError(
                f"the adapter has {kind}, which a GPU does not compute so far; merge "
                "the adapter into its base, or use --device cpu"
            )
        names = [name for slots in self.projections for name in slots.modules]
        ranks = tuple(adapter.modules[n].rank if n in adapter.modules else 0 for n in names)
        size, stored = self.layout.size(ranks), self.layout.dtype
        if self.device.type == "cuda":
            memory = torch.zeros(size, dtype=stored, pin_memory=True)
        else:  # where the kernels read it
            memory = empty_in_huge_pages((size,), stored).zero_()
        matrices = iter(self.layout.views(memory, ranks))
        outputs: dict[int, Tensor] = {}
        for index, slots in enumerate(self.projections):
            changes = {n: adapter.modules[n] for n in slots.modules if n in adapter.modules}
            vectors = None
            if not all(module.is_low_rank for module in changes.values()):
                vectors = outputs[index] = torch.zeros(2, slots.all_offsets[-1])
                layers = BaseLayers(self._whole_projections[index], slots.all_offsets)
            for part, name in enumerate(slots.modules):
                pair, module = next(matrices), changes.get(name)
                if module is None:
                    continue
                columns = slice(slots.all_offsets[part], slots.all_offsets[part + 1])
                scaled = module.b.float() * module.scale
                if vectors is not None and not module.is_low_rank:
                    vectors[:, columns] = layers.gains_and_shifts(part, module)
                    scaled *= 1 + vectors[0, columns, None]
                if pair is not None:
                    _write(pair, module.a, scaled.T)
        ends = None
        if _changes_ends(adapter) or (known is not None and self.device.type == "cpu"):
            assert self._base is not None
            whole = end_tensors(adapter, self.architecture, self._base, self.dtype, known)
            ends = None if whole is None else self.own_ends(whole)
        return StagedAdapter(memory, ranks, outputs, ends)

    def own_ends(self, whole: EndTensors) -> StagedEnds:
        """What this rank computes of an adapter's ends."""
        assert self._base is not None
        return stage_ends(
            whole,
            self._base,
            self.dtype,
            self._group,
            self._own_outputs,
            in_8_bits=self.layout.in_8_bits,
        )

    @cached_property
    def _whole_projections(self) -> Sequence[tuple[Weight, ...]]:
        """Read when the first adapter needs them."""
        assert self._base is not None
        return self._base.projections if self._whole is None else self._whole()

    def is_finite(self, staged: StagedAdapter) -> bool:
        """Whether no value overflowed in the slots' dtype."""
        parts = [staged.memory]
        if self.layout.in_8_bits:  # of codes the scales say it
            pairs = self.layout.views(staged.memory, staged.ranks)
            parts = [pair.scales for pair in pairs if pair is not None and pair.scales is not None]
        finite = all(bool(part.isfinite().all()) for part in (*parts, *staged.outputs.values()))
        return finite and (staged.ends is None or staged.ends.is_finite())

    def clear(self, slot: int) -> None:
        """Let go of what a slot refers to. Nothing may use the slot until it is filled again."""
        self._let_go(slot)

    def _let_go(self, slot: int) -> None:
        self._table[2, self._starts + slot * self._steps] = 0  # ranks
        self._ends.pop(slot, None)
        self._stretched.discard(slot)
        self._on_experts.discard(slot)
        for slots in self.projections:
            slots.outputs.pop(slot, None)
            slots.low_rank.matrices[slots.first + slot] = (None,) * len(slots.modules)
        if self._memory is not None:
            self._memory.release(slot)

    def fill(self, slot: int, staged: StagedAdapter) -> None:
        """Put an adapter into a slot in place of another. Kernels launched later see the new one.

        On a GPU there must be room for it: see :meth:`bytes_for`.
        """
        self._let_go(slot)
        memory = staged.memory if self._group.size == 1 else self._cut(staged)
        if self._memory is not None:
            for moved, there in self._memory.put(slot, memory, staged.ranks):
                self._refer(moved, there, self._memory.ranks(moved))
        else:
            self._refer(slot, memory, staged.ranks)
        if staged.ends is not None:
            self._ends[slot] = staged.ends
        for index, vectors in staged.outputs.items():
            self.projections[index].outputs[slot] = self._own_vectors(index, vectors)
            self._stretched.add(slot)
        dense = sum(len(slots.modules) for slots in self.projections[: self._first_of_experts])
        if any(staged.ranks[dense:]):
            self._on_experts.add(slot)

    def _refer(self, slot: int, memory: Tensor, ranks: Sequence[int]) -> None:
        """Have a slot refer to the matrices in memory, which is where the kernels read them."""
        entries: list[list[int]] = [[], [], [], []]
        pairs = iter(self._own_layout.views(memory, ranks))
        for slots in self.projections:
            own = tuple(itertools.islice(pairs, len(slots.modules)))
            found = slots.low_rank.put(slots.first + slot, own)
            for all_of, of_one in zip(entries, found, strict=True):
                all_of += of_one
        places = self._starts + slot * self._steps
        self._table[:, places] = send(entries, torch.int64, self.device)

    def _cut(self, staged: StagedAdapter) -> Tensor:
        """The outputs of this rank alone."""
        device, ranks = staged.memory.device, staged.ranks
        memory = torch.empty(self._own_layout.size(ranks), dtype=staged.memory.dtype, device=device)
        own = [ranges for slots in self.projections for ranges in slots.own]
        whole, cut = self.layout.views(staged.memory, ranks), self._own_layout.views(memory, ranks)
        for pair, target, ranges in zip(whole, cut, own, strict=True):
            if pair is not None and target is not None:
                target.a.copy_(pair.a)
                torch.cat([pair.b[:, start:stop] for start, stop in ranges], 1, out=target.b)
                if pair.scales is not None and target.scales is not None:
                    target.scales.copy_(pair.scales)
        return memory

    def _own_vectors(self, index: int, vectors: Tensor) -> Tensor:
        """Gains and shifts ``(2, out)`` of a projection, of this rank's outputs alone."""
        if self._group.size == 1:
            return vectors
        slots = self.projections[index]
        return torch.cat(
            [
                vectors[:, offset + start : offset + stop]
                for offset, ranges in zip(slots.all_offsets[:-1], slots.own, strict=True)
                for start, stop in ranges
            ],
            1,
        )

    def _shapes(self, own: bool) -> Iterator[tuple[int, int]]:
        """Inputs and outputs of each linear layer; own: those of this rank alone."""
        for slots in self.projections:
            offsets = slots.low_rank.offsets if own else slots.all_offsets
            for start, end in itertools.pairwise(offsets):
                yield slots.low_rank.inputs, end - start


def _write(pair: Matrices, a: Tensor, b: Tensor) -> None:
    """Write both matrices, rounded as ``pair`` holds them."""
    if pair.scales is None:
        pair.a.copy_(a)
        pair.b.copy_(b)
        return
    for target, scales, matrix in zip((pair.a, pair.b), pair.scales, (a, b), strict=True):
        codes, found = in_8_bits(matrix)
        target.copy_(codes)
        scales.copy_(found)


def _changes_ends(adapter: LoRAAdapter) -> bool:
    return bool(adapter.embedding or adapter.head or adapter.norms)


def _stretching(adapter: LoRAAdapter) -> str | None:
    """What of projections the adapter changes beside low-rank changes; None if nothing."""
    other = [each for each in adapter.modules.values() if not each.is_low_rank]
    # Those that stretch first: DoRA may be beside biases.
    return kind_of(max(other, key=lambda each: each.stretches)) if other else None
