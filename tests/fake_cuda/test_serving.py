"""The engine on a GPU: answers as on the CPU, one wait a step, nothing compiled on the way.

Every step's inputs, adapters and samples go through pinned memory and captured graphs here as they
would on a GPU, by its rules (``device.py``).
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.engine import (
    AdapterConfig,
    Engine,
    EngineConfig,
    EngineFailedError,
    OutOfMemoryError,
    Request,
    SamplingParams,
)
from nybble.engine.scheduler import ScheduledSequence
from nybble.engine.sequence import BlockTable, Sequence
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.reference import TokenChoice
from nybble.kernels.triton import attention_splits, matmul, overlap
from nybble.kernels.triton.attention import splitting_of
from nybble.loaders import open_checkpoint

from .device import DEVICE, Device
from .launches import MULTIPROCESSORS

CPU = EngineConfig(
    dtype=torch.float32,
    block_size=16,
    kv_cache_bytes=1 << 16,
    max_num_seqs=4,
    max_batched_tokens=32,
    max_model_len=64,
    adapters=AdapterConfig(slots=2, max_rank=8),
)
GPU = replace(CPU, device="cuda:1", dtype=torch.float16, tune=False)
ONE_WAIT = "Stream.synchronize in nybble.engine.sampler._to_host"


@contextmanager
def running(folder: Path, config: EngineConfig) -> Iterator[Engine]:
    """A warm engine. What warming up launches is not computed, only specialised."""
    engine = Engine.load(open_checkpoint(folder), config, progress=False)
    DEVICE.computes = False
    engine.warm_up(progress=False)
    DEVICE.computes = True
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def _tokens(engine: Engine, request: Request) -> list[int]:
    return [t async for output in engine.generate(request) for t in output.token_ids]


def ask(engine: Engine, requests: list[Request]) -> list[Any]:
    """What each request was answered: token ids, or the exception."""

    async def all_at_once() -> list[Any]:
        asked = (_tokens(engine, request) for request in requests)
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(all_at_once())


def request(
    name: str, start: int, length: int, *, adapter: str | None = None, **params: Any
) -> Request:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "ignore_eos": True} | params
    prompt = tuple(range(start, start + length))
    return Request(name, prompt, SamplingParams(**settings), adapter=adapter)


# Longer than a step's budget, with and without adapters (three for two slots), greedy and drawn.
REQUESTS = [
    request("plain", 5, 3),
    request("long", 40, 37, adapter="a0", logprobs=2, prompt_logprobs=1),
    request("biased", 90, 12, adapter="a1", logit_bias={7: 2.0, 9: -3.0}, repetition_penalty=1.2),
    request("drawn", 60, 5, adapter="a2", temperature=0.8, top_k=20, top_p=0.9, seed=3),
    request("late", 120, 2, presence_penalty=0.5, max_tokens=2),
]
SHORT = request("short", 5, 3, max_tokens=2)  # the first, as far as one replay of a graph


@pytest.fixture(scope="session")
def folders(tiny_adapter: Callable[..., Path]) -> list[Path]:
    return [tiny_adapter(seed=seed, layers_to_transform=[0]) for seed in range(3)]


@pytest.fixture(scope="session")
def expected(checkpoint: Path, folders: list[Path]) -> list[list[int]]:
    """The answers of the CPU, in float32."""
    with running(checkpoint, CPU) as engine:
        for index, folder in enumerate(folders):
            engine.load_adapter(f"a{index}", str(folder))
        return ask(engine, REQUESTS)


@pytest.mark.parametrize(
    "kv_dtype", ["auto", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8", "int8"))]
)
def test_answers_are_as_on_the_cpu_with_one_wait_a_step_and_no_compiling(
    gpu: Device,
    checkpoint: Path,
    folders: list[Path],
    expected: list[list[int]],
    kv_dtype: Any,
) -> None:
    with running(checkpoint, replace(GPU, kv_dtype=kv_dtype)) as engine:
        warm = set(gpu.launched)
        for index, folder in enumerate(folders):
            engine.load_adapter(f"a{index}", str(folder))
        gpu.waits.clear()
        answers = ask(engine, REQUESTS)
        steps = engine.stats().steps
    if kv_dtype == "auto":
        assert answers == expected
    # 8 bits may choose other tokens, as many.
    assert list(map(len, answers)) == list(map(len, expected))
    assert gpu.replays > 0
    assert set(gpu.launched) - warm == set()
    assert not any("launch_pdl" in variant for _, variant in gpu.launched)  # see below
    waits = [each for each in gpu.waits if "prompt_reader" not in each]
    assert set(waits) == {ONE_WAIT}
    assert len(waits) <= steps


@pytest.mark.parametrize(
    ("slots", "used"), [(18, 17), pytest.param(70, 66, marks=pytest.mark.slow)]
)
def test_a_prompt_beside_tokens_of_many_adapters_compiles_nothing(
    gpu: Device, checkpoint: Path, slots: int, used: int
) -> None:
    config = replace(
        GPU,
        max_num_seqs=72,
        max_batched_tokens=320,
        max_model_len=512,
        adapters=AdapterConfig(slots=slots, max_rank=8),
    )
    engine = Engine.load(open_checkpoint(checkpoint), config, progress=False)
    gpu.computes = False
    engine.warm_up(progress=False)
    warm = set(gpu.launched)
    runner = engine._runner
    inputs = runner._idle_prefill(300, 1)
    rows = [min(row, used - 1) for row in range(300)]
    inputs = replace(inputs, lora=LoRABatch.of(rows, inputs.token_ids.device))
    with torch.inference_mode():
        runner._forward(inputs, runner._step_adapters(inputs))
        # An adapter may have tokens of its own.
        logits = torch.zeros(3, runner.decoder.architecture.vocab + 3, device=runner.device)
        runner.decoder.backend.sample_tokens(logits, [TokenChoice(1.0, 20, 0.9, 0.0, 0.5)] * 3)
    assert set(gpu.launched) - warm == set()


def test_kernels_of_a_step_are_launched_to_overlap_if_that_is_switched_on(
    gpu: Device, checkpoint: Path, expected: list[list[int]], monkeypatch: Any
) -> None:
    monkeypatch.setattr(overlap, "OVERLAP", True)
    with running(checkpoint, replace(GPU, adapters=None)) as engine:
        assert ask(engine, [SHORT]) == [expected[0][:2]]
    overlapping = {kernel for kernel, variant in gpu.launched if "launch_pdl" in variant}
    kernels = {"rms_norm_kernel", "rotary_store_kernel", "decode_kernel", "reduce_kernel"}
    kernels |= {"matmul_kernel", "few_rows_kernel", "largest_kernel", "draw_kernel"}
    assert {kernel for kernel, _ in gpu.launched} >= kernels | {"prefill_kernel"}
    # Those that do not wait for the one before begin after it, as usual.
    assert overlapping == kernels


def test_few_tokens_of_some_of_many_sequences_compile_nothing(
    gpu: Device, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though so many sequences with few tokens each would not fit what splits may take."""
    config = replace(GPU, max_num_seqs=40, max_batched_tokens=320, adapters=None)
    engine = Engine.load(open_checkpoint(checkpoint), config, progress=False)
    runner = engine._runner
    (attention,) = runner.decoder.architecture.attentions
    heads = attention.heads, attention.kv_heads, attention.head_dim
    row = 4 * heads[0] * heads[2] * splitting_of(*heads, MULTIPROCESSORS).max_splits
    monkeypatch.setattr(attention_splits, "PARTS", 50 * row)
    gpu.computes = False
    engine.warm_up(progress=False)
    warm = set(gpu.launched)
    batch = []
    for count in (37, 5, *[1] * 38):
        new = Request("r", tuple(range(count)), SamplingParams())
        sequence = Sequence(new, 1, detokenizer=None, sampler=None)  # type: ignore[arg-type]
        sequence.block_tables = (BlockTable([0, 1, 2]),)
        batch.append(ScheduledSequence.of(sequence, count))
    with torch.inference_mode():
        runner._forward(runner._inputs.build(batch), None)
    assert set(gpu.launched) - warm == set()


def test_prompts_beside_decodes_are_one_launch_before_the_output_layer(
    gpu: Device, checkpoint: Path
) -> None:
    config = replace(GPU, max_num_seqs=20, max_batched_tokens=64, adapters=None)
    engine = Engine.load(open_checkpoint(checkpoint), config, progress=False)
    gpu.computes = False
    engine.warm_up(progress=False)
    gpu.computes = True
    runner = engine._runner
    graphs, runner_graphs = runner._mixed, runner._graphs
    # A prompt for each of attention's kernels: many rows, a few, and one; 26 rows are padded to 32.
    sequences = []
    for index, (computed, count) in enumerate(((0, 17), (0, 5), (0, 3), (6, 1))):
        new = Request(
            "r", tuple(range(10 * index, 10 * index + computed + count)), SamplingParams()
        )
        sequence = Sequence(new, 1, detokenizer=None, sampler=None)  # type: ignore[arg-type]
        sequence.block_tables = (BlockTable([2 * index, 2 * index + 1]),)
        sequence.num_computed_tokens = computed
        sequences.append((sequence, count))
    batch = [ScheduledSequence.of(*each) for each in sequences]
    found = []
    for captured in (True, False):
        runner.reset()
        runner._mixed, runner._graphs = (graphs, runner_graphs) if captured else (None, None)
        before, submitted, replays = gpu.launched.copy(), gpu.submitted, gpu.replays
        with torch.inference_mode():
            logits = runner.run(batch).cpu()
        kernels = Counter[str]()
        for (kernel, _), count in (gpu.launched - before).items():
            kernels[kernel] += count
        found.append((logits, kernels, gpu.submitted - submitted, gpu.replays - replays))
    (by_graph, of_head, few, replayed), (eager, kernels, many, none) = found
    assert (replayed, none) == (1, 0)
    torch.testing.assert_close(by_graph, eager, rtol=2e-2, atol=2e-2)
    assert {"prefill_kernel", "decode_kernel", "rotary_store_kernel"} <= kernels.keys()
    assert of_head <= kernels
    assert not {"prefill_kernel", "decode_kernel", "rotary_store_kernel"} & of_head.keys()
    assert few < many - kernels.total() + of_head.total()


def test_inputs_wait_for_the_copy_of_those_before_where_no_sample_has(
    gpu: Device, checkpoint: Path
) -> None:
    chunks = [request("chunks", 40, 60, max_tokens=1)]
    answers = []
    for device in (CPU, GPU):
        config = replace(device, adapters=None, max_batched_tokens=24)
        with running(checkpoint, config) as engine:
            gpu.waits.clear()
            answers.append(ask(engine, chunks))
    assert answers[0] == answers[1]
    sent = "Event.synchronize in nybble.engine.inputs.build"
    assert gpu.waits == [sent, sent, ONE_WAIT]


def test_failed_steps_are_forgotten_and_captured_graphs_go_on(
    gpu: Device,
    checkpoint: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that found no memory costs its request alone; after another the engine begins again."""
    with running(checkpoint, replace(GPU, adapters=None, restarts=1)) as engine:
        mixed, engine._runner._mixed = engine._runner._mixed, None  # graphs have their memory
        gpu.total = gpu.allocated + (4 << 10)  # too little for a prompt, enough for a replay
        (failed,) = ask(engine, [request("long", 40, 30)])
        gpu.total = 64 << 20
        assert isinstance(failed, OutOfMemoryError)
        engine._runner._mixed = mixed
        assert engine.failure is None
        assert ask(engine, [SHORT]) == [expected[0][:2]]
        replay = Device.replay

        def fail(device: Device, graph: Any) -> None:
            monkeypatch.setattr(Device, "replay", replay)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(Device, "replay", fail)
        (failed,) = ask(engine, [replace(SHORT, request_id="failing")])
        assert isinstance(failed, EngineFailedError)
        while engine.failure is not None:
            time.sleep(0.01)
        assert ask(engine, [replace(REQUESTS[0], request_id="again")]) == [expected[0]]


def test_the_cache_takes_what_the_device_has_left_and_leaves_a_tenth(
    gpu: Device, checkpoint: Path, expected: list[list[int]]
) -> None:
    gpu.total = 3200 << 10
    config = replace(GPU, kv_cache_bytes=None, max_num_seqs=24, max_model_len=512)
    with running(checkpoint, replace(config, adapters=None)) as engine:
        kept = engine.stats().kv_blocks_total * engine._runner.layout.block_bytes
        assert 0.6 * gpu.total < kept < 0.9 * gpu.total
        assert engine.kv_cache_tokens(512) < config.max_num_seqs * 512  # more would be of no use
        assert ask(engine, [SHORT]) == [expected[0][:2]]


def test_an_engine_that_is_gone_leaves_nothing_on_the_device(gpu: Device, checkpoint: Path) -> None:
    before = gpu.allocated
    with running(checkpoint, GPU) as engine:
        loaded = gpu.allocated
        ask(engine, [SHORT])
        assert gpu.allocated == loaded
    del engine
    gpu.start_anew()  # the graphs
    matmul.arrivals.cache_clear()  # the matmuls' counters
    gc.collect()
    assert gpu.allocated == before
