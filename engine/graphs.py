"""CUDA graphs of steps: one launch instead of hundreds, for a few sizes.

A step that verifies drafts computes several rows of each sequence. Its graph is for as many rows of
every sequence: those of shorter drafts are padded, which costs little where rows are few.

A small step that computes a part of a prompt, alone or beside decodes, has a graph by its number of
rows. Its sequences may have any of them, because kernels find their work in the batch. Which rows
are sampled differs from step to step, so that such a graph ends with the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from nybble.engine.inputs import StepInputs
from nybble.kernels.progress import Progress, track


class Replay(Protocol):
    """A captured computation, which can be run again on the current content of its inputs."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, 16, 24, …, and the largest batch itself."""
    sizes = [1, 2, 4, 8, *range(16, 129, 8), *range(144, 513, 16)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


# Sequences of a step that verifies drafts and is captured. With more of them a row costs so much
# that few are drafted, and launching is a small part of the step.
_MOST_VERIFYING = 8


@dataclass(frozen=True, order=True)
class StepShape:
    """How many sequences a captured step has, and how many rows each of them."""

    seqs: int
    width: int = 1

    @property
    def rows(self) -> int:
        return self.seqs * self.width


@dataclass(frozen=True)
class MixedShape:
    """A captured step of ``rows`` rows, of which each of ``seqs`` sequences has any number."""

    seqs: int
    rows: int


# Products of rows between two of these take as long as those of the greater. Above the last one,
# computing a step takes longer than to launch its kernels one by one.
_MIXED_ROWS = (16, 32, 64, 128, 256)


def mixed_shapes(max_num_seqs: int, max_batched_tokens: int) -> list[MixedShape]:
    """Steps of prompts and decodes to capture: of few numbers of rows, or the most of a step."""
    sizes = sorted({min(rows, max_batched_tokens) for rows in _MIXED_ROWS})
    return [MixedShape(min(max_num_seqs, rows), rows) for rows in sizes]


def verify_shapes(max_num_seqs: int, max_draft_tokens: int) -> list[StepShape]:
    """Steps to capture that verify drafts: 1, 2, 4 or 8 sequences with 1, 2, 4, … draft tokens, and
    the most."""
    drafts = [*(n for n in (1, 2, 4, 8, 16) if n < max_draft_tokens), max_draft_tokens]
    most = min(max_num_seqs, _MOST_VERIFYING)
    seqs = [*(n for n in (1, 2, 4) if n < most), most]
    return [StepShape(each, 1 + count) for each in seqs for count in drafts]


def cuda_capture(device: torch.device) -> Capture:
    """A function that captures on ``device``, which must be the current device.

    All graphs share one memory pool, because only one runs at a time. During a capture other
    threads may use the device, on streams of their own.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        # Run once without capturing: kernels get compiled and libraries allocate workspaces,
        # neither of which a capture allows.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = function()
        return graph, out

    return capture


class AdapterUse(Enum):
    """Which adapters a step applies."""

    NONE = auto()
    ON_LAYERS = auto()  # on all layers but experts
    ON_EXPERTS = auto()  # on experts too


class Shape(Protocol):
    """What graphs differ in, beside the adapters that they apply. Can be hashed."""

    @property
    def rows(self) -> int: ...


AnyShape = TypeVar("AnyShape", bound=Shape)


class StepGraphs(Generic[AnyShape]):
    """Graphs by the shape of the step and the adapters that they apply.

    inputs_for: ``inputs_for(shape, use)`` builds padded inputs, at the same memory addresses every
        time for the same shape.
    compute: ``compute(inputs, use)`` turns inputs into what :meth:`run` returns.
    uses: what to capture graphs for.
    """

    def __init__(
        self,
        capture: Capture,
        shapes: Iterable[AnyShape],
        inputs_for: Callable[[AnyShape, AdapterUse], StepInputs],
        compute: Callable[[StepInputs, AdapterUse], Tensor],
        *,
        uses: Sequence[AdapterUse],
        progress: Progress = True,
    ) -> None:
        self._graphs: dict[tuple[AnyShape, AdapterUse], tuple[Replay, Tensor]] = {}
        # The largest first: smaller graphs then reuse its memory in the pool.
        largest_first = sorted(shapes, key=lambda shape: shape.rows, reverse=True)
        todo = [(shape, use) for shape in largest_first for use in uses]
        for shape, use in track(todo, "Capturing CUDA graphs", progress):
            inputs = inputs_for(shape, use)
            self._graphs[shape, use] = capture(partial(compute, inputs, use))

    def smallest(self, use: AdapterUse, fits: Callable[[AnyShape], bool]) -> AnyShape | None:
        """The captured shape with fewest rows that fits; None if none does."""
        fitting = (shape for shape, kind in self._graphs if kind == use and fits(shape))
        return min(fitting, key=lambda shape: shape.rows, default=None)

    def run(self, shape: AnyShape, use: AdapterUse) -> Tensor:
        """What is computed of the inputs last built for this shape.

        The next run overwrites it.
        """
        graph, out = self._graphs[shape, use]
        graph.replay()
        return out


class DecodeGraphs(StepGraphs[StepShape]):
    """Steps whose sequences have one row each, or the rows of drafts. They compute logits."""

    def shape_for(self, seqs: int, width: int, use: AdapterUse) -> StepShape | None:
        """The smallest captured shape that takes so many sequences and rows of each.

        A step of one row each takes no shape of more: its attention is another kernel's.
        """

        def fits(shape: StepShape) -> bool:
            return shape.seqs >= seqs and (shape.width >= width if width > 1 else shape.width == 1)

        return self.smallest(use, fits)


class MixedGraphs(StepGraphs[MixedShape]):
    """Steps whose sequences have any rows. They compute hidden states."""

    def shape_for(self, rows: int, use: AdapterUse) -> MixedShape | None:
        """The smallest captured shape of so many rows."""
        return self.smallest(use, lambda shape: shape.rows >= rows)
