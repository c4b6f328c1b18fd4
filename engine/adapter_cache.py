"""Which adapters are in host memory and in device slots.

Three tiers: the adapter's folder on disk, a staged copy in host memory, a slot on the device. Each
upper tier keeps what was used last. Reading begins when a request queues, a few at a time, tenants
in turn; a staged adapter is copied into a slot by the engine thread, one in a step at most.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nybble.engine.adapter_slots import AdapterSlots, StagedAdapter

Residency = Literal["device", "host", "disk"]

# So that what a tenant needs waits for few of another's.
_READS_AT_ONCE = 2


@dataclass(eq=False)
class AdapterVersion:
    """What a name stood for when it was loaded; a request keeps the version it began with.

    waiting, running: the requests that use it. tenant: whose request queued for it last.
    slot: where it is on the device, None if nowhere.
    retired: no longer behind a name; forgotten when the last request is done.
    """

    name: str
    folder: Path
    digest: bytes
    rank: int
    nbytes: int
    loaded: int = field(default_factory=lambda: int(time.time()))
    hits: int = 0
    waiting: int = 0
    running: int = 0
    tenant: str = ""
    slot: int | None = None
    in_host: bool = False
    retired: bool = False

    @property
    def residency(self) -> Residency:
        return "device" if self.slot is not None else "host" if self.in_host else "disk"


class AdapterCache:
    """Host copies and device slots; for the engine thread alone.

    filled_in_step: whether an adapter was copied into a slot in this step; there is one at most.
    """

    def __init__(
        self, slots: AdapterSlots, host_bytes: int, load: Callable[[AdapterVersion], None]
    ) -> None:
        """load: begins to read a version from disk; ``staged`` or ``failed`` is its answer."""
        self._slots = slots
        self._free_bytes = host_bytes
        self._load = load
        self._host: OrderedDict[AdapterVersion, StagedAdapter] = OrderedDict()
        self._loading: set[AdapterVersion] = set()
        # By tenant, the next in turn first.
        self._wanted: OrderedDict[str, OrderedDict[AdapterVersion, None]] = OrderedDict()
        # Least recently used first.
        self._in_slot: OrderedDict[int, AdapterVersion | None] = OrderedDict.fromkeys(
            range(slots.count)
        )
        self.filled_in_step = False

    @property
    def slots(self) -> int:
        return self._slots.count

    @property
    def all_pinned(self) -> bool:
        """Whether every slot is in use by a running request."""
        return all(held is not None and held.running for held in self._in_slot.values())

    def begin_step(self) -> None:
        self.filled_in_step = False

    def queue(self, version: AdapterVersion, tenant: str) -> None:
        """A request for the version waits: fetch it."""
        version.waiting += 1
        version.tenant = tenant
        self._want(version)

    def ready(self, version: AdapterVersion) -> bool:
        """Whether nothing but a free slot is needed to run it."""
        return version.slot is not None or version in self._host

    def can_acquire(self, version: AdapterVersion) -> bool:
        """Whether :meth:`acquire` would find it a slot now."""
        if version.slot is not None:
            return True
        return version in self._host and not self.filled_in_step and not self.all_pinned

    def acquire(self, version: AdapterVersion) -> bool:
        """Pin the version in a slot for a request that stops waiting; False if it cannot be now."""
        if version.slot is None and not self._fill(version):
            return False
        assert version.slot is not None
        self._in_slot.move_to_end(version.slot)
        version.waiting -= 1
        version.running += 1
        self._start_loading()
        return True

    def preempt(self, version: AdapterVersion, tenant: str) -> None:
        """A running request waits again."""
        version.running -= 1
        self.queue(version, tenant)

    def release(self, version: AdapterVersion, *, running: bool) -> None:
        """A request is done with the version."""
        if running:
            version.running -= 1
        else:
            version.waiting -= 1
        self._forget_if_unused(version)
        self._start_loading()

    def retire(self, version: AdapterVersion) -> None:
        """The version has lost its name; requests that have it keep it."""
        version.retired = True
        self._forget_if_unused(version)

    def offer(self, version: AdapterVersion, staged: StagedAdapter) -> None:
        """A copy that exists anyway: kept if there is room without taking anyone's."""
        if self._free_bytes >= staged.nbytes and not self.ready(version):
            self._free_bytes -= staged.nbytes
            self._keep(version, staged)

    def staged(self, version: AdapterVersion, staged: StagedAdapter) -> None:
        """The answer to ``load``."""
        self._loading.remove(version)
        self._keep(version, staged)
        self._forget_if_unused(version)
        self._start_loading()

    def failed(self, version: AdapterVersion) -> None:
        """The other answer to ``load``."""
        self._loading.remove(version)
        self._free_bytes += version.nbytes
        self._start_loading()

    def _keep(self, version: AdapterVersion, staged: StagedAdapter) -> None:
        self._host[version] = staged
        version.in_host = True

    def _want(self, version: AdapterVersion) -> None:
        if not self.ready(version) and version not in self._loading:
            self._wanted.setdefault(version.tenant, OrderedDict())[version] = None
            self._start_loading()

    def _start_loading(self) -> None:
        """Begin to read what is wanted, tenants in turn, as far as host memory goes."""
        while len(self._loading) < _READS_AT_ONCE:
            tenant = next((t for t in list(self._wanted) if self._start_one(t)), None)
            if tenant is None:
                return
            self._wanted.move_to_end(tenant)

    def _start_one(self, tenant: str) -> bool:
        """Begin to read the first a tenant wants; False if there is none or no room for it."""
        queue = self._wanted[tenant]
        while queue and not self._needs_reading(next(iter(queue))):
            queue.popitem(last=False)
        if not queue:
            del self._wanted[tenant]
            return False
        version = next(iter(queue))
        if not self._make_room(version):
            return False
        del queue[version]
        self._free_bytes -= version.nbytes
        self._loading.add(version)
        self._load(version)
        return True

    def _needs_reading(self, version: AdapterVersion) -> bool:
        return bool(version.waiting) and not self.ready(version) and version not in self._loading

    def _make_room(self, newcomer: AdapterVersion) -> bool:
        """Drop host copies until there is room, or none at all.

        First those that no queued request needs, then those of a tenant that would still have at
        least as much as the newcomer's.
        """
        free, dropped = self._free_bytes, []
        held: Counter[str] = Counter()
        for version in (*self._host, *self._loading):
            if version.waiting and version.slot is None:
                held[version.tenant] += version.nbytes
        mine = held[newcomer.tenant] + newcomer.nbytes
        # What has lost its name may not be on disk any more.
        replaceable = (v for v in self._host if not (v.retired and (v.waiting or v.running)))
        by_use = sorted(replaceable, key=self._needed_beside_slot)
        for version in by_use:
            if free >= newcomer.nbytes:
                break
            if self._needed_beside_slot(version):
                if held[version.tenant] - version.nbytes < mine:
                    continue
                held[version.tenant] -= version.nbytes
            free += version.nbytes
            dropped.append(version)
        if free < newcomer.nbytes:
            return False
        for version in dropped:
            self._drop(version)
            if self._needed_beside_slot(version):
                self._wanted.setdefault(version.tenant, OrderedDict())[version] = None
        return True

    def _needed_beside_slot(self, version: AdapterVersion) -> bool:
        return version.slot is None and version.waiting > 0

    def _drop(self, version: AdapterVersion) -> None:
        del self._host[version]
        version.in_host = False
        self._free_bytes += version.nbytes

    def _fill(self, version: AdapterVersion) -> bool:
        staged = self._host.get(version)
        if staged is None:
            self._want(version)
            return False
        if self.filled_in_step:
            return False
        slot = self._least_useful_slot()
        if slot is None:
            return False
        evicted = self._in_slot[slot]
        if evicted is not None:
            evicted.slot = None
        self._slots.fill(slot, staged)
        self.filled_in_step = True
        self._host.move_to_end(version)
        self._in_slot[slot] = version
        version.slot = slot
        if evicted is not None and evicted.waiting:
            self._want(evicted)  # last: room for it may be made of the host copy just used
        return True

    def _least_useful_slot(self) -> int | None:
        """An empty slot, else the least recently used that nobody runs, best that nobody awaits."""
        idle = [slot for slot, held in self._in_slot.items() if held is None or not held.running]
        for slot in idle:
            held = self._in_slot[slot]
            if held is None or not held.waiting:
                return slot
        return idle[0] if idle else None

    def _forget_if_unused(self, version: AdapterVersion) -> None:
        if not version.retired or version.waiting or version.running:
            return
        if version in self._host:
            self._drop(version)
        # After a restart a version that had lost its name may still believe in its slot.
        if version.slot is not None and self._in_slot[version.slot] is version:
            self._in_slot[version.slot] = None
            self._in_slot.move_to_end(version.slot, last=False)
            version.slot = None
