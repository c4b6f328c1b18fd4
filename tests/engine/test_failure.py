"""What the engine does when computing fails: it tells everybody, and begins again if it may."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.engine import (
    AdapterConfig,
    AdapterUnavailableError,
    Engine,
    EngineConfig,
    EngineFailedError,
    EngineStoppedError,
    OutOfMemoryError,
    Request,
    RequestOutput,
    SamplingParams,
)
from nybble.engine.failure import Restarts, describe, is_out_of_memory
from nybble.engine.ranks import RankFailedError
from nybble.loaders import open_checkpoint

CONFIG = EngineConfig(
    dtype=torch.float32, block_size=4, kv_cache_bytes=1 << 20, max_num_seqs=6, max_batched_tokens=16
)


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Engine]:
    from dataclasses import replace

    engine = Engine.load(open_checkpoint(folder), replace(CONFIG, **settings), progress=False)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def request(name: str, length: int = 6, count: int = 8, adapter: str | None = None) -> Request:
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    return Request(name, tuple(range(3, 3 + length)), params, adapter=adapter)


async def tokens(engine: Engine, asked: Request) -> list[int]:
    outputs: list[RequestOutput] = [output async for output in engine.generate(asked)]
    return [token for output in outputs for token in output.token_ids]


async def gather(engine: Engine, requests: list[Request]) -> list[Any]:
    return await asyncio.gather(*(tokens(engine, r) for r in requests), return_exceptions=True)


def fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception, when: Callable[[Any], bool]
) -> None:
    """The engine's steps raise ``error`` for the batches that ``when`` chooses."""
    compute = engine._runner.run

    def run(batch: Any) -> torch.Tensor:
        if when(batch):
            raise error
        return compute(batch)

    monkeypatch.setattr(engine._runner, "run", run)


def test_a_thread_that_waits_for_a_dead_device_keeps_no_client_waiting(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another rank is gone in the middle of what a GPU exchanges."""
    monkeypatch.setattr("nybble.engine.engine_thread._PATIENCE_SECONDS", 0.05)
    entered, answered, dead = threading.Event(), threading.Event(), threading.Event()

    def wait(batch: Any) -> torch.Tensor:
        entered.set()
        answered.wait()
        raise RuntimeError("the device was reset")

    with running(tiny_model()) as engine:
        engine.when_dead(dead.set)
        monkeypatch.setattr(engine._runner, "run", wait)

        async def ask() -> list[Any]:
            asking = asyncio.gather(
                *(tokens(engine, request(n)) for n in "ab"), return_exceptions=True
            )
            await asyncio.to_thread(entered.wait)
            await asyncio.to_thread(engine._thread.fail, EngineFailedError("rank 1 ended"))
            return await asking

        for error in asyncio.run(ask()):
            assert isinstance(error, EngineFailedError)
            assert "rank 1 ended" in str(error)
        assert dead.is_set()
        assert engine._thread.is_alive()  # it waits for the device
        assert not engine.healthy
        engine.stop()
        answered.set()
        engine._thread.join()
        assert engine.failure is not None
        assert "rank 1 ended" in engine.failure


def first(times: int) -> Callable[[Any], bool]:
    left = [times]

    def when(_batch: Any) -> bool:
        left[0] -= 1
        return left[0] >= 0

    return when


def wait_until_healthy(engine: Engine) -> None:
    async def wait() -> None:
        async with asyncio.timeout(60):
            while not engine.healthy:
                await asyncio.sleep(0.01)

    asyncio.run(wait())


def test_a_failure_ends_every_request_and_the_engine(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_model()) as engine:
        fails(engine, monkeypatch, RuntimeError("the device is gone"), first(1))
        dead: list[bool] = []

        def first_told() -> None:
            dead.append(True)
            # Who asks while the thread is still ending is told as well.
            engine.when_dead(lambda: dead.append(True))

        engine.when_dead(first_told)
        results = asyncio.run(gather(engine, [request(f"{i}") for i in range(3)]))
        assert all(isinstance(result, EngineStoppedError) for result in results)
        assert any(isinstance(result, EngineFailedError) for result in results)
        assert engine.failure == "RuntimeError: the device is gone"
        assert (engine.stats().failures, engine.stats().restarts) == (1, 0)
        with pytest.raises(EngineStoppedError, match="the device is gone"):
            asyncio.run(tokens(engine, request("later")))
        engine._thread.join()
        assert dead == [True, True]
        engine.when_dead(lambda: dead.append(False))  # who asks too late is told at once
        assert dead == [True, True, False]


def test_an_engine_that_may_begin_again_answers_as_before(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = AdapterConfig(slots=1, max_rank=8)
    with running(tiny_model(), restarts=2, adapters=adapters) as engine:
        engine.load_adapter("one", str(tiny_adapter(seed=1)))
        engine.load_adapter("two", str(tiny_adapter(seed=2)))
        asked = [request("base"), request("one", adapter="one"), request("two", adapter="two")]
        before = asyncio.run(gather(engine, asked))
        assert len({tuple(found) for found in before}) == 3
        for _ in range(2):
            with monkeypatch.context() as patch:
                fails(engine, patch, RuntimeError("once"), first(1))
                assert any(
                    isinstance(result, EngineFailedError)
                    for result in asyncio.run(gather(engine, asked))
                )
            wait_until_healthy(engine)
            assert asyncio.run(gather(engine, asked)) == before
        stats = engine.stats()
        assert (stats.failures, stats.restarts) == (2, 2)
        assert stats.kv_blocks_free == stats.kv_blocks_total
        assert [info.running + info.waiting for info in engine.adapters()] == [0, 0]
        fails(engine, monkeypatch, RuntimeError("once too often"), first(1))
        asyncio.run(gather(engine, asked))
        engine._thread.join()
        assert engine.failure == "RuntimeError: once too often"


def test_a_failure_while_beginning_again_counts_too(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_model(), restarts=3) as engine:

        def broken() -> None:
            raise RuntimeError("the device stays away")

        monkeypatch.setattr(engine._runner, "reset", broken)
        fails(engine, monkeypatch, RuntimeError("once"), first(1))
        asyncio.run(gather(engine, [request("a")]))
        engine._thread.join()
        assert engine.failure == "RuntimeError: the device stays away"
        assert (engine.stats().failures, engine.stats().restarts) == (4, 3)


def test_an_engine_that_is_stopped_as_it_begins_again_ends(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_model(), restarts=3) as engine:
        thread = engine._thread
        stopping = threading.Thread(target=engine.stop)
        take = thread._restarts.take

        def take_while_it_is_stopped() -> bool:
            stopping.start()
            while thread._inbox.empty():
                pass
            return take()

        monkeypatch.setattr(thread._restarts, "take", take_while_it_is_stopped)
        fails(engine, monkeypatch, RuntimeError("once"), first(1))
        asyncio.run(gather(engine, [request("a")]))
        stopping.join(60)
        assert not stopping.is_alive()


def test_restarts_are_bounded_in_a_window_of_time() -> None:
    now = [0.0]
    restarts = Restarts(2, seconds=100, clock=lambda: now[0])
    taken = []
    for now[0] in (0, 50, 99, 101, 102, 151, 300):
        taken.append(restarts.take())
    assert taken == [True, True, False, True, False, True, True]
    assert restarts.taken == 5
    assert not Restarts(0).take()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_without_memory_for_a_step_only_its_largest_request_ends(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    assert is_out_of_memory(error)
    with running(tiny_model()) as engine:
        small = [request(f"{i}", length=2) for i in range(3)]
        alone = [asyncio.run(tokens(engine, asked)) for asked in small]
        fails(engine, monkeypatch, error, lambda batch: any(i.num_tokens > 4 for i in batch))
        large = request("large", length=9)
        results = asyncio.run(gather(engine, [small[0], large, *small[1:]]))
        assert isinstance(results.pop(1), OutOfMemoryError)
        assert results == alone
        assert engine.healthy
        stats = engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks_total
        assert stats.failures == 0


def test_that_another_rank_had_no_memory_fails_the_engine() -> None:
    """A step cannot be computed again without that rank, though the error quotes the allocator."""
    assert not is_out_of_memory(
        RankFailedError("rank 1: RuntimeError: DefaultCPUAllocator: can't allocate memory")
    )


def test_with_no_memory_at_all_each_request_ends_and_the_engine_does_not(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_model()) as engine:
        with monkeypatch.context() as patch:
            fails(engine, patch, MemoryError(), lambda batch: True)
            results = asyncio.run(gather(engine, [request(f"{i}") for i in range(4)]))
            assert all(isinstance(result, OutOfMemoryError) for result in results)
        assert len(asyncio.run(tokens(engine, request("later")))) == 8


def test_more_than_the_kv_cache_holds_is_computed_one_after_another(
    tiny_model: Callable[..., Path],
) -> None:
    with running(tiny_model(), kv_cache_bytes=1 << 17, max_model_len=64) as engine:
        assert engine.stats().kv_blocks_total < 6 * 64 // 4
        asked = [request(f"{i}", count=engine.max_model_len - 6) for i in range(6)]
        results = asyncio.run(gather(engine, asked))
        assert [len(result) for result in results] == [engine.max_model_len - 6] * 6
        assert engine.stats().preemptions > 0


def test_an_adapter_whose_folder_is_gone_ends_only_its_own_requests(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapters = AdapterConfig(slots=1, max_rank=8, host_bytes=70_000)
    with running(tiny_model(), adapters=adapters) as engine:
        for name in ("one", "two"):
            shutil.copytree(tiny_adapter(seed=len(name)), tmp_path / name)
            engine.load_adapter(name, str(tmp_path / name))
        shutil.rmtree(tmp_path / "two")
        asked = [request("base"), request("b", adapter="two"), request("a", adapter="one")]
        base, two, one = asyncio.run(gather(engine, asked))
        assert len(base) == len(one) == 8
        assert isinstance(two, AdapterUnavailableError)
        assert engine.healthy


def test_an_adapter_that_cannot_be_read_for_any_reason_ends_its_requests(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = AdapterConfig(slots=1, max_rank=8, host_bytes=70_000)
    with running(tiny_model(), adapters=adapters) as engine:
        for name in ("one", "two"):
            engine.load_adapter(name, str(tiny_adapter(seed=len(name))))
        assert engine._adapters is not None

        def no_memory(*_: object) -> None:
            raise MemoryError("pinned memory")

        monkeypatch.setattr(type(engine._adapters), "_read", no_memory)
        (two,) = asyncio.run(gather(engine, [request("b", adapter="two")]))
        assert isinstance(two, AdapterUnavailableError)


def test_a_cause_is_one_line_of_bounded_length() -> None:
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert describe(MemoryError()) == "MemoryError"
    assert len(describe(RuntimeError("x" * 9999))) < 400
