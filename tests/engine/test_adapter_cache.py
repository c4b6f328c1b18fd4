"""The cache of adapters under any order of events, against what must hold at every moment."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nybble.engine.adapter_cache import AdapterCache, AdapterVersion
from nybble.engine.adapter_ends import StagedEnds
from nybble.engine.adapter_slots import StagedAdapter

NAMES = st.integers(0, 5)
TENANTS = st.sampled_from(["a", "b"])


def copy_of(version: AdapterVersion, ends: StagedEnds | None = None) -> StagedAdapter:
    return StagedAdapter(torch.empty(version.nbytes, dtype=torch.int8), (), ends=ends)


class Slots:
    """In place of the device's: what was last put into each.

    memory: bytes of all slots together, if they have copies; None if they refer to host memory.
    """

    def __init__(self, count: int, memory: int | None = 1000) -> None:
        self.count, self.memory = count, memory
        self.refer_to_host = memory is None
        self.content: list[StagedAdapter | None] = [None] * count
        self.fills = 0

    def fill(self, slot: int, staged: StagedAdapter) -> None:
        self.content[slot] = staged
        self.fills += 1
        assert self.free_bytes >= 0

    def clear(self, slot: int) -> None:
        self.content[slot] = None

    def bytes_in(self, slot: int) -> int:
        held = self.content[slot]
        return 0 if held is None else self.bytes_for(held)

    def bytes_for(self, staged: StagedAdapter) -> int:
        return 0 if self.memory is None else staged.nbytes

    @property
    def free_bytes(self) -> int:
        return (self.memory or 0) - sum(map(self.bytes_in, range(self.count)))


class CacheUnderTraffic(RuleBasedStateMachine):
    """Names are replaced and unloaded; requests queue, run, are preempted and leave."""

    @initialize(
        slots=st.integers(1, 3),
        host=st.integers(4, 12),
        memory=st.one_of(st.none(), st.integers(4, 12)),
    )
    def start(self, slots: int, host: int, memory: int | None) -> None:
        self.slots, self.host = Slots(slots, memory), host
        self.reading: list[AdapterVersion] = []
        self.cache = AdapterCache(self.slots, host, self.reading.append)  # type: ignore[arg-type]
        self.named: dict[int, AdapterVersion] = {}
        self.versions: list[AdapterVersion] = []
        self.waiting: list[tuple[AdapterVersion, str]] = []
        self.running: list[tuple[AdapterVersion, str]] = []
        self.copies: dict[int, AdapterVersion] = {}
        self.fills_before_step = 0

    def staged(self, version: AdapterVersion) -> StagedAdapter:
        # Slots refer to what some copies hold.
        ends = StagedEnds(None, None, {}, ()) if version.nbytes % 2 else None
        copy = copy_of(version, ends)
        self.copies[id(copy)] = version
        self._alive = [*getattr(self, "_alive", []), copy]  # so that no id is used twice
        return copy

    @rule(name=NAMES, nbytes=st.integers(1, 4))
    def load_or_replace(self, name: int, nbytes: int) -> None:
        version = AdapterVersion(f"{name}", Path(f"{name}"), b"", 8, nbytes)
        if name in self.named:
            self.cache.retire(self.named[name])
        self.named[name] = version
        self.versions.append(version)
        self.cache.offer(version, self.staged(version))

    @rule(name=NAMES)
    def unload(self, name: int) -> None:
        if name in self.named:
            self.cache.retire(self.named.pop(name))

    @rule(name=NAMES, tenant=TENANTS)
    def arrive(self, name: int, tenant: str) -> None:
        if name in self.named:
            self.waiting.append((self.named[name], tenant))
            self.cache.queue(self.named[name], tenant)

    @rule()
    def step(self) -> None:
        self.cache.begin_step()
        self.fills_before_step = self.slots.fills

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.waiting) - 1))
        version, tenant = self.waiting[index]
        if self.cache.ready(version) and self.cache.acquire(version):
            del self.waiting[index]
            self.running.append((version, tenant))

    @precondition(lambda self: self.named)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        self.cache.pin(self.named[data.draw(st.sampled_from(sorted(self.named)))], pinned)

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        before = [v for v in self.versions if v.in_host and (v.pinned or v.waiting)]
        version = self.named[data.draw(st.sampled_from(sorted(self.named)))]
        asked = version.pinned or version.waiting
        self.cache.prefetch(version)
        assert asked or all(each.in_host or each.slot is not None for each in before)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), preempted=st.booleans())
    def finish_or_preempt(self, data: st.DataObject, preempted: bool) -> None:
        version, tenant = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if preempted:
            self.cache.preempt(version, tenant)
            self.waiting.append((version, tenant))
        else:
            self.cache.release(version, running=True)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        version, _ = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.cache.release(version, running=False)

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), fails=st.booleans())
    def read(self, data: st.DataObject, fails: bool) -> None:
        version = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
        if not fails:
            self.cache.staged(version, self.staged(version))
            return
        self.cache.failed(version)
        for request in [request for request in self.waiting if request[0] is version]:
            self.waiting.remove(request)
            self.cache.release(version, running=False)

    @invariant()
    def a_running_request_finds_its_own_adapter_in_its_slot(self) -> None:
        for version, _ in self.running:
            assert version.slot is not None
            content = self.slots.content[version.slot]
            assert self.copies[id(content)] is version

    @invariant()
    def no_slot_belongs_to_two(self) -> None:
        taken = [version.slot for version in self.versions if version.slot is not None]
        assert len(taken) == len(set(taken))
        assert set(taken) <= set(range(self.slots.count))

    @invariant()
    def requests_are_counted(self) -> None:
        waiting = Counter(id(version) for version, _ in self.waiting)
        running = Counter(id(version) for version, _ in self.running)
        for version in self.versions:
            assert (version.waiting, version.running) == (
                waiting[id(version)],
                running[id(version)],
            )

    @invariant()
    def host_memory_is_never_exceeded_and_never_lost(self) -> None:
        held = sum(version.nbytes for version in self.versions if version.in_host)
        assert held + sum(version.nbytes for version in self.reading) <= self.host
        free = self.cache._free_bytes
        assert free + held + sum(version.nbytes for version in self.reading) == self.host

    @invariant()
    def a_step_fills_one_slot_at_most(self) -> None:
        assert self.slots.fills - self.fills_before_step <= 1

    @invariant()
    def nothing_is_kept_of_what_nobody_can_use(self) -> None:
        for version in self.versions:
            if version.retired and not (version.waiting or version.running):
                assert version.slot is None
                assert not version.in_host

    @invariant()
    def what_has_lost_its_name_stays_in_memory_while_it_is_needed(self) -> None:
        for version in self.versions:
            if getattr(version, "was_in_host", False) and version.retired and version.waiting:
                assert version.in_host
            version.was_in_host = version.in_host  # type: ignore[attr-defined]

    def teardown(self) -> None:
        """Whatever has happened, everyone who waits has a turn."""
        if not hasattr(self, "cache"):
            return
        for version, _ in self.running:
            self.cache.release(version, running=True)
        self.running.clear()
        for _ in range(4 * len(self.waiting) + 4):
            while self.reading:
                version = self.reading.pop(0)
                self.cache.staged(version, self.staged(version))
            self.cache.begin_step()
            for request in list(self.waiting):
                version = request[0]
                if self.cache.ready(version) and self.cache.acquire(version):
                    self.waiting.remove(request)
                    self.cache.release(version, running=True)
        assert not self.waiting


TestCacheUnderTraffic = CacheUnderTraffic.TestCase
TestCacheUnderTraffic.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_slot_is_filled_though_its_host_copy_makes_room_for_what_is_taken_out() -> None:
    reading: list[AdapterVersion] = []
    slots = Slots(1)
    cache = AdapterCache(slots, 8, reading.append)  # type: ignore[arg-type]
    awaited, first, second = (
        AdapterVersion(name, Path(name), b"", 8, nbytes=4) for name in ("awaited", "1", "2")
    )

    def read_all() -> None:
        while reading:
            cache.staged(version := reading.pop(0), copy_of(version))

    cache.queue(awaited, "a")
    read_all()
    cache.begin_step()
    assert cache.acquire(awaited)
    cache.release(awaited, running=True)
    cache.queue(awaited, "a")  # in its slot; its host copy goes for the other tenant's two
    cache.queue(first, "b")
    cache.queue(second, "b")
    read_all()
    cache.begin_step()
    assert cache.acquire(first)
    assert (first.residency, awaited.residency) == ("device", "disk")
    assert reading == [awaited]  # where first's copy was


def test_a_pinned_adapter_is_read_and_stays_while_others_can_make_room() -> None:
    reading: list[AdapterVersion] = []
    cache = AdapterCache(Slots(2), 12, reading.append)  # type: ignore[arg-type]
    pinned, *others = (AdapterVersion(name, Path(name), b"", 8, nbytes=4) for name in "p1234")

    def use(version: AdapterVersion) -> None:
        cache.queue(version, "a")
        while reading:
            cache.staged(found := reading.pop(0), copy_of(found))
        cache.begin_step()
        assert cache.acquire(version)
        cache.release(version, running=True)

    cache.pin(pinned, True)
    assert reading == [pinned]
    use(pinned)
    for other in others:
        use(other)
    assert pinned.residency == "device"
    assert [other.residency for other in others] == ["disk", "disk", "host", "device"]
    cache.pin(pinned, False)
    use(others[0])
    use(others[1])
    assert (pinned.residency, pinned.in_host) == ("disk", False)


def test_a_prefetched_adapter_takes_the_place_of_what_nobody_needs_and_of_nothing_else() -> None:
    reading: list[AdapterVersion] = []
    cache = AdapterCache(Slots(1), 8, reading.append)  # type: ignore[arg-type]
    first, second, third, large = (
        AdapterVersion(name, Path(name), b"", 8, nbytes=8 if name == "large" else 4)
        for name in ("1", "2", "3", "large")
    )

    def read_all() -> list[str]:
        names = []
        while reading:
            names.append(reading[0].name)
            cache.staged(found := reading.pop(0), copy_of(found))
        return names

    cache.prefetch(first)
    cache.prefetch(second)
    assert read_all() == ["1", "2"]
    cache.prefetch(first)  # is there: it only counts as the last used
    cache.prefetch(third)
    assert read_all() == ["3"]
    assert [each.residency for each in (first, second, third)] == ["host", "disk", "host"]
    cache.queue(first, "a")
    cache.pin(third, True)
    cache.prefetch(second)
    cache.prefetch(large)
    assert read_all() == []
    cache.queue(second, "a")  # the hint that was given up does not keep requests from their turn
    assert read_all() == ["2"]
    assert (first.in_host, second.in_host, third.in_host) == (True, True, False)
