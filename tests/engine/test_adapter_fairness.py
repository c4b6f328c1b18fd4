"""One tenant's many adapters leave another its share of slots, of reads and of host memory."""

from __future__ import annotations

from pathlib import Path

import torch

from nybble.engine import Request, SamplingParams
from nybble.engine.adapter_cache import AdapterCache, AdapterVersion
from nybble.engine.adapter_slots import StagedAdapter
from nybble.engine.block_manager import BlockManager
from nybble.engine.scheduler import Scheduler
from nybble.engine.sequence import Sequence

SIZE = 100


class Slots:
    """In place of the device's."""

    refer_to_host, free_bytes = False, 0

    def __init__(self, count: int) -> None:
        self.count = count

    def fill(self, slot: int, staged: StagedAdapter) -> None:
        pass

    def clear(self, slot: int) -> None:
        pass

    def bytes_in(self, slot: int) -> int:
        return 0

    def bytes_for(self, staged: StagedAdapter) -> int:
        return 0


class World:
    """A scheduler whose adapters are read when the test says so."""

    def __init__(self, *, slots: int, in_host: int, seats: int = 16) -> None:
        self.reading: list[AdapterVersion] = []
        self.read: list[AdapterVersion] = []
        self.cache = AdapterCache(Slots(slots), in_host * SIZE, self.reading.append)  # type: ignore[arg-type]
        blocks = BlockManager(1000, 16, prefix_caching=False)
        self.scheduler = Scheduler(blocks, seats, 256, self.cache)
        self.versions: dict[str, AdapterVersion] = {}

    def add(self, tenant: str, name: str, output: int = 1000) -> Sequence:
        request = Request(f"{tenant} {name}", (1, 2, 3), SamplingParams(), tenant=tenant)
        sequence = Sequence(request, output, None, None)  # type: ignore[arg-type]
        if name not in self.versions:
            self.versions[name] = AdapterVersion(name, Path(name), name.encode(), 8, SIZE)
        sequence.adapter = self.versions[name]
        self.scheduler.add(sequence)
        return sequence

    def finish_read(self) -> None:
        version = self.reading.pop(0)
        self.read.append(version)
        self.cache.staged(version, StagedAdapter(torch.empty(SIZE, dtype=torch.int8), ()))

    def step(self) -> None:
        for item in self.scheduler.schedule():
            self.scheduler.computed(item)
            item.sequence.token_ids.append(0)

    def running(self) -> list[str]:
        return [sequence.request_id for sequence in self.scheduler.running]


def test_a_tenant_gets_its_share_of_the_slots_though_all_are_in_use() -> None:
    world = World(slots=4, in_host=100)
    for index in range(4):
        world.add("flood", f"f{index}")
    for _ in range(4):
        world.finish_read()
        world.step()
    assert len(world.running()) == 4
    waiting = [world.add("flood", "f9"), world.add("quiet", "q0"), world.add("quiet", "q1")]
    waiting.append(world.add("quiet", "q2"))
    while world.reading:
        world.finish_read()
    for _ in range(5):
        world.step()
    # Half of the slots and no more; the flood's oldest go on.
    assert sorted(world.running()) == ["flood f0", "flood f1", "quiet q0", "quiet q1"]
    # What was interrupted goes on when there is room.
    world.scheduler.finish(waiting[1])
    world.scheduler.finish(waiting[2])
    world.scheduler.finish(waiting[3])
    for _ in range(5):
        world.step()
    assert sorted(world.running()) == ["flood f0", "flood f1", "flood f2", "flood f3"]


def test_an_adapter_that_two_tenants_share_is_not_taken_from_either() -> None:
    world = World(slots=2, in_host=100)
    shared = world.add("flood", "s").adapter
    other = world.add("third", "x")
    other.adapter = shared  # queued under its own name, used under the other's
    assert shared is not None
    shared.waiting += 1
    world.add("flood", "f")
    while world.reading:
        world.finish_read()
    for _ in range(3):
        world.step()
    assert sorted(world.running()) == ["flood f", "flood s", "third x"]
    world.add("quiet", "q")
    world.finish_read()
    for _ in range(3):
        world.step()
    assert "third x" in world.running()
    assert "flood s" in world.running()


def test_tenants_adapters_are_read_in_turn() -> None:
    world = World(slots=4, in_host=1000)
    for index in range(100):
        world.add("flood", f"f{index}")
    assert len(world.reading) <= 2
    world.add("quiet", "q")
    for _ in range(4):
        world.finish_read()
    assert "q" in [version.name for version in world.read]
    while world.reading:
        world.finish_read()
    assert len(world.read) == 101


def test_host_memory_full_of_what_a_tenant_waits_for_yields_to_another() -> None:
    world = World(slots=1, in_host=4)
    world.add("flood", "f0")
    for index in range(1, 20):
        world.add("flood", f"f{index}")
    while world.reading:
        world.finish_read()
    world.step()
    while world.reading:
        world.finish_read()
    quiet = world.add("quiet", "q")
    while world.reading:
        world.finish_read()
    assert quiet.adapter is not None
    assert quiet.adapter.residency == "host"
    # Nobody is forgotten: as requests finish, every adapter has its turn.
    served = set()
    for _ in range(200):
        world.step()
        for sequence in list(world.scheduler.running):
            served.add(sequence.request_id)
            world.scheduler.finish(sequence)
        while world.reading:
            world.finish_read()
    assert len(served) == 21


def test_nobody_is_interrupted_for_a_request_whose_adapter_finds_no_slot() -> None:
    """Three tenants with an adapter each, two slots, six seats, of which two are each one's share.

    The third's requests would have a seat, but no slot to go with it.
    """
    world = World(slots=2, in_host=100, seats=6)
    for tenant in "ab":
        for _ in range(3):
            world.add(tenant, f"adapter of {tenant}")
    for _ in range(2):
        world.finish_read()
        world.step()
    assert len(world.running()) == 6
    for _ in range(3):
        world.add("c", "adapter of c")
    world.finish_read()
    for _ in range(50):
        world.step()
        assert len(world.running()) == 6
    assert world.scheduler.preemptions == 0


def test_nobody_is_interrupted_for_a_slot_in_a_step_that_has_filled_one() -> None:
    world = World(slots=3, in_host=100)
    for index in range(2):
        world.add("flood", f"f{index}")
    for _ in range(2):
        world.finish_read()
        world.step()
    for tenant in ("first", "second"):
        world.add(tenant, f"adapter of {tenant}")
        world.finish_read()
    world.step()  # fills the last slot
    assert world.running() == ["flood f0", "flood f1", "first adapter of first"]
    assert world.scheduler.preemptions == 0
    world.step()
    assert "second adapter of second" in world.running()
    assert world.scheduler.preemptions == 1
