"""A small step is a fixed list of operations on fixed memory, as a CUDA graph needs it.

The stand-in for a graph records every operation the step makes, and replays exactly those, on the
tensors it saw: a number that the host has read, or a tensor that lies elsewhere the next time,
gives the wrong logits here as it would on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nybble.engine import EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.drafter import Draft
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.request import Request, SamplingParams
from nybble.engine.runner import ModelRunner
from nybble.engine.scheduler import ScheduledSequence
from nybble.engine.sequence import BlockTable, Sequence
from nybble.kernels import reference
from nybble.kernels.packed import LinearKernel, Weight
from nybble.models import architecture_of

SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero")
CONFIG = EngineConfig(dtype=torch.float32, block_size=4, max_num_seqs=4, max_batched_tokens=32)


class Recording(TorchDispatchMode):
    """Keeps every operation with its arguments and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in SYNCHRONIZING):
            raise AssertionError(f"{func} waits for the device")
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


RECORDING: list[Recording] = []


def recorded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if RECORDING:
            return RECORDING[-1].call(kernel, args, kwargs)
        return kernel(*args, **kwargs)

    return call


class Graph:
    def __init__(self, function: Callable[[], Tensor]) -> None:
        function()
        with Recording() as recording:
            RECORDING.append(recording)
            self.out = function()
            RECORDING.pop()
        self.calls = recording.calls
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self.calls:
            now = func(*args, **kwargs)
            for old, new in zip(_tensors(before), _tensors(now), strict=True):
                if old.data_ptr() != new.data_ptr():  # not a view, nor computed in place
                    old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for t in result if isinstance(t, Tensor)] if isinstance(result, tuple | list) else []


class SingleOperations:
    """The reference, each kernel of which is recorded as one operation.

    A kernel reads on the device what its reference reads on the host.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def linear(self, weight: Weight, dtype: torch.dtype) -> LinearKernel:
        return recorded(reference.linear(weight, dtype))

    rotary_store = staticmethod(recorded(reference.rotary_store))
    paged_attention = staticmethod(recorded(reference.paged_attention))


def sequence(name: str, prompt: list[int], blocks: list[int]) -> Sequence:
    made = Sequence(Request(name, tuple(prompt), SamplingParams()), 1, None, None)  # type: ignore[arg-type]
    made.block_tables = (BlockTable(blocks),)
    return made


def verify(runner: ModelRunner) -> list[Tensor]:
    """Logits of sequences whose drafts are as long as a graph's, shorter, and of different lengths,
    and at last too near to the longest sequence to be padded."""
    one, two = (
        sequence("1", [*range(40, 53)], [5, 2, 9, 0, 10, 11]),
        sequence("2", [60, 61], [7, 1, 4, 12]),
    )
    long = sequence("3", [*range(100, 160)], [*range(16, 32)])
    found = []

    def step(*batch: tuple[Sequence, int]) -> None:
        scheduled = [
            ScheduledSequence.of(each, 1, Draft((70, 71, 72, 73)[:count], (0,) * count), count)
            for each, count in batch
        ]
        logits = runner.run(scheduled).clone()
        assert len(logits) == sum(item.num_logits for item in scheduled)
        found.append(logits)
        row = 0
        for item in scheduled:  # as if no draft was right
            item.sequence.num_computed_tokens += 1
            item.sequence.token_ids.append(int(logits[row].argmax()))
            row += item.num_logits

    with torch.inference_mode():
        for each in (one, two, long):
            item = ScheduledSequence.of(each, each.num_uncomputed_tokens)
            found.append(runner.run([item]).clone())
            each.num_computed_tokens += item.num_tokens
            each.token_ids.append(int(found[-1][0].argmax()))
        for lengths in ((1, 1), (2, 2), (4, 1), (3, 0), (0, 2), (0, 0)):
            step((one, lengths[0]), (two, lengths[1]))
        step((two, 2))
        step((long, 1))
        step((long, 2), (two, 1))  # padded to as many rows as there are positions
        step((long, 1), (two, 2))  # there are not so many
    return found


def run(runner: ModelRunner, steps: int) -> list[Tensor]:
    """Logits of sequences that come, grow, go and change places."""
    one, two = sequence("1", [*range(40, 53)], [5, 2, 9, 0]), sequence("2", [60, 61], [7, 1, 4])
    found = []

    def step(*batch: tuple[Sequence, int]) -> None:
        scheduled = [ScheduledSequence.of(each, count) for each, count in batch]
        logits = runner.run(scheduled).clone()
        found.append(logits)
        completing = [item.sequence for item in scheduled if item.completes]
        for item in scheduled:
            item.sequence.num_computed_tokens += item.num_tokens
        for each, row in zip(completing, logits, strict=True):
            each.token_ids.append(int(row.argmax()))

    with torch.inference_mode():
        step((one, 13))
        step((one, 1))
        step((one, 1), (two, 2))
        for _ in range(steps):
            step((one, 1), (two, 1))
        step((two, 1))
        three = sequence("3", [90, 91, 92, 93, 94], [3, 8, 6])
        step((two, 1), (three, 3))
        step((three, 2), (two, 1))
        step((three, 1), (two, 1))
    return found


@pytest.mark.parametrize("way", ["decodes", "drafts"])
def test_replayed_operations_give_the_logits_of_every_later_step(
    plain_checkpoint: Callable[..., Any], way: str
) -> None:
    checkpoint = plain_checkpoint()
    results, graphs = [], []
    config = CONFIG
    if way == "drafts":
        config = replace(CONFIG, speculate="ngram", max_draft_tokens=4, max_batched_tokens=64)

    def capture(function: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        graphs.append(Graph(function))
        return graphs[-1], graphs[-1].out

    for captured in (False, True):
        model = Decoder(
            architecture_of(checkpoint.config),
            checkpoint.weights(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            max_model_len=64,
            backend=SingleOperations(),
        )
        layout = KVCacheLayout.of(model.architecture, config, 64)
        runner = ModelRunner(model, config, layout, 32)
        if captured:
            runner.capture(capture, progress=False)
        results.append(run(runner, 3) if way == "decodes" else verify(runner))
    # All of them: prompts alone and beside decodes too.
    assert sum(graph.replays for graph in graphs) == (10 if way == "decodes" else 13)
    assert sum(graph.replays > 0 for graph in graphs) >= 2
    for eager, replayed in zip(*results, strict=True):
        torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-4)
