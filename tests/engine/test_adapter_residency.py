"""Hundreds of adapters through a few slots: nothing fails, nothing is mixed up, all have a turn."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.engine import AdapterConfig, Engine, EngineConfig, Request, SamplingParams, adapters
from nybble.loaders import open_checkpoint

CONFIG = EngineConfig(
    dtype=torch.float32,
    block_size=4,
    kv_cache_bytes=1 << 20,
    max_num_seqs=12,
    max_batched_tokens=48,
    max_model_len=48,
    max_waiting=1000,
)
COUNT = 100


@pytest.fixture(scope="module")
def folders(
    tiny_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Adapters of one rank, each a trained one's tensors in another order and size."""
    trained = tiny_adapter(r=2)
    tensors = load_file(trained / "adapter_model.safetensors")
    torch.manual_seed(0)
    made = []
    for index in range(COUNT):
        folder = tmp_path_factory.mktemp("many") / f"{index}"
        shutil.copytree(trained, folder)
        changed = {
            name: (tensor[:, torch.randperm(tensor.shape[1])] * (1 + torch.rand(()))).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(changed, folder / "adapter_model.safetensors")
        made.append(folder)
    return made


def start(folder: Path, slots: int, host_bytes: int = 1 << 30) -> Engine:
    config = replace(CONFIG, adapters=AdapterConfig(slots, max_rank=2, host_bytes=host_bytes))
    engine = Engine.load(open_checkpoint(folder), config, progress=False)
    engine.start()
    return engine


def load_all(engine: Engine, folders: list[Path]) -> None:
    """Load them by their number."""
    for index, path in enumerate(folders):
        engine.load_adapter(str(index), str(path))


async def ask(engine: Engine, name: str, adapter: str | None, count: int, stop: int) -> list[int]:
    """Up to ``stop`` tokens of ``count``, then go away."""
    ids = tuple(range(3, 12))
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    found: list[int] = []
    stream = engine.generate(Request(name, ids, params, adapter=adapter))
    async for output in stream:
        found += output.token_ids
        if len(found) >= stop:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module")
def expected(
    tiny_model: Callable[..., Path], folders: list[Path]
) -> Iterator[dict[str | None, list[int]]]:
    """What each says alone, with a slot for everyone."""
    engine = start(tiny_model(), slots=COUNT)
    load_all(engine, folders)

    async def alone() -> dict[str | None, list[int]]:
        names = [None, *map(str, range(COUNT))]
        return {name: await ask(engine, "r", name, 12, 12) for name in names}

    yield asyncio.run(alone())
    engine.stop()


def test_a_hundred_adapters_go_through_eight_slots_under_random_traffic(
    tiny_model: Callable[..., Path],
    folders: list[Path],
    expected: dict[str | None, list[int]],
) -> None:
    assert len({tuple(found) for found in expected.values()}) > COUNT / 2
    probe = start(tiny_model(), slots=1)
    nbytes = probe.load_adapter("0", str(folders[0])).nbytes
    probe.stop()
    engine = start(tiny_model(), slots=8, host_bytes=20 * nbytes)
    load_all(engine, folders)
    rng = random.Random(0)

    async def client(number: int) -> None:
        await asyncio.sleep(rng.random())
        adapter = None if rng.random() < 0.1 else str(rng.randrange(COUNT))
        count = rng.randint(1, 12)
        stop = rng.randint(1, 12) if rng.random() < 0.3 else count
        found = await ask(engine, f"{number}", adapter, count, stop)
        assert found == expected[adapter][: min(count, stop)]

    async def traffic() -> None:
        await asyncio.gather(*(client(number) for number in range(150)))
        # Those who went away early are noticed at the next step.
        while any(info.running or info.waiting for info in engine.adapters()):
            await asyncio.sleep(0.01)

    try:
        asyncio.run(asyncio.wait_for(traffic(), 300))
        infos = engine.adapters()
        assert sum(info.residency == "device" for info in infos) == 8
        assert sum(info.residency == "host" for info in infos) <= 20
        assert sum(info.hits for info in infos) > 125
        stats = engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks_total
    finally:
        engine.stop()


def test_others_go_on_while_an_adapter_is_read(
    tiny_model: Callable[..., Path],
    folders: list[Path],
    expected: dict[str | None, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start(tiny_model(), slots=1)
    nbytes = engine.load_adapter("0", str(folders[0])).nbytes
    engine.stop()
    # Room for two, so that the third has to be read when it is asked for, instead of the second.
    engine = start(tiny_model(), slots=2, host_bytes=2 * nbytes)
    engine.load_adapter("0", str(folders[0]))
    engine.load_adapter("2", str(folders[2]))
    engine.load_adapter("1", str(folders[1]))
    disk = threading.Event()
    read = adapters.load_adapter

    def slow(*arguments: object) -> object:
        assert disk.wait(30)
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(adapters, "load_adapter", slow)

    async def scenario() -> None:
        blocked = asyncio.create_task(ask(engine, "blocked", "1", 12, 12))
        for name, adapter in (("a", "0"), ("b", None), ("c", "0")):
            assert await ask(engine, name, adapter, 12, 12) == expected[adapter]
        steps = engine.stats().steps
        await asyncio.sleep(0.05)
        assert engine.stats().steps == steps, "the engine spins while it waits for the disk"
        assert not blocked.done()
        disk.set()
        assert await blocked == expected["1"]

    try:
        asyncio.run(asyncio.wait_for(scenario(), 60))
    finally:
        disk.set()
        engine.stop()


def test_popular_adapters_do_not_keep_another_out_for_ever(
    tiny_model: Callable[..., Path],
    folders: list[Path],
    expected: dict[str | None, list[int]],
) -> None:
    """With one slot and a stream of requests that overlap, the other adapter has its turn."""
    engine = start(tiny_model(), slots=1)
    engine.load_adapter("0", str(folders[0]))
    engine.load_adapter("1", str(folders[1]))

    async def scenario() -> None:
        done = asyncio.Event()

        async def hot(number: int) -> None:
            turn = 0
            while not done.is_set():
                await ask(engine, f"hot {number} {turn}", "0", 3 + number, 12)
                turn += 1

        crowd = [asyncio.create_task(hot(number)) for number in range(4)]
        await asyncio.sleep(0.1)
        assert await ask(engine, "cold", "1", 12, 12) == expected["1"]
        done.set()
        await asyncio.gather(*crowd)

    try:
        asyncio.run(asyncio.wait_for(scenario(), 60))
    finally:
        engine.stop()


def test_a_request_whose_version_is_written_over_before_it_begins_gets_the_new_one(
    tiny_model: Callable[..., Path],
    folders: list[Path],
    expected: dict[str | None, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start(tiny_model(), slots=1)
    nbytes = engine.load_adapter("0", str(folders[0])).nbytes
    engine.stop()
    folder = Path(shutil.copytree(folders[0], tmp_path / "a"))
    engine = start(tiny_model(), slots=2, host_bytes=nbytes)
    engine.load_adapter("a", str(folder))
    engine.load_adapter("1", str(folders[1]))
    disk = threading.Event()
    read = adapters.load_adapter

    def slow(*arguments: object) -> object:
        if threading.current_thread().name.startswith("nybble-adapters"):
            assert disk.wait(30)
        return read(*arguments)  # type: ignore[arg-type]

    async def scenario() -> None:
        # Memory has room for one copy, which is the other's now.
        assert await ask(engine, "other", "1", 12, 12) == expected["1"]
        monkeypatch.setattr(adapters, "load_adapter", slow)
        early = asyncio.create_task(ask(engine, "early", "a", 12, 12))
        await asyncio.sleep(0.05)
        shutil.copytree(folders[2], folder, dirs_exist_ok=True)
        await asyncio.to_thread(engine.load_adapter, "a", str(folder))
        disk.set()
        assert await early == expected["2"]

    assert expected["0"] != expected["2"]
    try:
        asyncio.run(asyncio.wait_for(scenario(), 60))
        (info,) = (each for each in engine.adapters() if each.name == "a")
        assert (info.waiting, info.running) == (0, 0)
    finally:
        disk.set()
        engine.stop()
