"""CUDA graphs of the decode step: one launch instead of hundreds, for a few batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from functools import partial
from typing import Protocol

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


class DecodeGraphs:
    """Graphs by batch size and the adapters that they apply.

    inputs_for: ``inputs_for(size, use)`` builds padded inputs, at the same memory addresses every
        time for the same size.
    compute: ``compute(inputs, use)`` turns inputs into logits ``(size, vocab)``.
    uses: what to capture graphs for.
    """

    def __init__(
        self,
        capture: Capture,
        sizes: Iterable[int],
        inputs_for: Callable[[int, AdapterUse], StepInputs],
        compute: Callable[[StepInputs, AdapterUse], Tensor],
        *,
        uses: Sequence[AdapterUse],
        progress: Progress = True,
    ) -> None:
        self._graphs: dict[tuple[int, AdapterUse], tuple[Replay, Tensor]] = {}
        # The largest first: smaller graphs then reuse its memory in the pool.
        todo = [(size, use) for size in sorted(sizes, reverse=True) for use in uses]
        for size, use in track(todo, "Capturing CUDA graphs", progress):
            inputs = inputs_for(size, use)
            self._graphs[size, use] = capture(partial(compute, inputs, use))

    def size_for(self, rows: int, use: AdapterUse) -> int | None:
        """The smallest captured batch size of at least ``rows``; None if there is none."""
        sizes = (size for size, kind in self._graphs if kind == use and size >= rows)
        return min(sizes, default=None)

    def run(self, size: int, use: AdapterUse) -> Tensor:
        """Logits ``(size, vocab)`` for the inputs last built for this size.

        The next run overwrites them.
        """
        graph, out = self._graphs[size, use]
        graph.replay()
        return out
