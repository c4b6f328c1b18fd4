"""Which adapters are in host memory and in device slots.

There are three tiers: the adapter's folder on disk, a staged copy in host memory, a slot on the
device, which on the CPU refers to the copy in host memory. The upper two evict the least recently
used. Reading from disk begins when a request queues: at most two adapters at a time, tenants in
turn. The engine thread puts staged adapters into slots, at most one a step.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nybble.engine.adapter_slots import AdapterSlots, StagedAdapter
from nybble.engine.tokens import Tokens

logger = logging.getLogger(__name__)

Residency = Literal["device", "host", "disk"]

# Few, so that a tenant's adapter never waits behind many reads for other tenants.
_READS_AT_ONCE = 2


@dataclass(frozen=True)
class MixturePart:
    """An adapter in a mixture: where it is, the digest of PEFT's two files, and its weight."""

    name: str
    folder: Path
    digest: bytes
    weight: float


@dataclass(eq=False)
class AdapterVersion:
    """An adapter as it was loaded under a name. A request keeps the version it began with.

    digest: of its files' content.
    nbytes: size in host memory.
    weights_digest: of the content of PEFT's two files, which is all that a mixture has of it.
    loaded: when, in seconds since 1970.
    hits: requests so far.
    waiting: queued requests that use it.
    running: running requests that use it.
    last_used: when a request last asked for it, in seconds since 1970; None if none has.
    tenant: the tenant whose request queued for it last.
    tenants: those whose requests have asked for it, up to a number of them.
    pinned: whether its host copy and its slot are the last to be given to another.
    slot: its slot on the device; None if it is in none.
    in_host: whether a staged copy is in host memory.
    retired: replaced or unloaded; it is forgotten once its last request is done.
    parts: of a mixture, whose ``folder`` is that of the first; empty for another adapter.
    invocation: of an aLoRA, the tokens from whose last occurrence in the prompt on it is active.
    template: its own chat template, or several by name; None for the base model's.
    sampling: what its makers recommend for requests that name no value; None for the base model's.
    end_tokens: its own, beside the base model's.
    tokens: of an adapter with tokens of its own; None for the base model's.
    not_a_sum: why it cannot be part of a mixture; None if it can.
    """

    name: str
    folder: Path
    digest: bytes
    rank: int
    nbytes: int
    weights_digest: bytes = b""
    loaded: int = field(default_factory=lambda: int(time.time()))
    hits: int = 0
    waiting: int = 0
    running: int = 0
    last_used: int | None = None
    tenant: str = ""
    tenants: set[str] = field(default_factory=set)
    pinned: bool = False
    slot: int | None = None
    in_host: bool = False
    retired: bool = False
    parts: tuple[MixturePart, ...] = ()
    not_a_sum: str | None = None
    invocation: tuple[int, ...] = ()
    template: str | Mapping[str, str] | None = None
    sampling: Mapping[str, float] | None = None
    end_tokens: frozenset[int] = frozenset()
    tokens: Tokens | None = None

    def start(self, prompt: Sequence[int]) -> int | None:
        """The first position at which it is active in a text with this prompt; None for never."""
        wanted = self.invocation
        for at in range(len(prompt) - len(wanted), -1, -1) if wanted else ():
            if tuple(prompt[at : at + len(wanted)]) == wanted:
                return at
        return None if wanted else 0

    @property
    def residency(self) -> Residency:
        return "device" if self.slot is not None else "host" if self.in_host else "disk"


class AdapterCache:
    """Host copies and device slots. Used by the engine thread alone.

    filled_in_step: whether an adapter was copied into a slot in this step (at most one is).
    """

    def __init__(
        self, slots: AdapterSlots, host_bytes: int, load: Callable[[AdapterVersion], None]
    ) -> None:
        """load: starts reading a version from disk, and later calls ``staged`` or ``failed``."""
        self._slots = slots
        self._free_bytes = host_bytes
        self._load = load
        self._host: OrderedDict[AdapterVersion, StagedAdapter] = OrderedDict()
        self._loading: set[AdapterVersion] = set()
        self._expected: set[AdapterVersion] = set()  # to read, though no request waits for them
        self._urgent: set[AdapterVersion] = set()
        # Versions to read, by tenant. The tenant whose turn is next comes first.
        self._wanted: OrderedDict[str, OrderedDict[AdapterVersion, None]] = OrderedDict()
        # Least recently used first.
        self._in_slot: OrderedDict[int, AdapterVersion | None] = OrderedDict.fromkeys(
            range(slots.count)
        )
        self.filled_in_step = False

    @property
    def slots(self) -> int:
        return self._slots.count

    def begin_step(self) -> None:
        self.filled_in_step = False

    def queue(self, version: AdapterVersion, tenant: str) -> None:
        """Count a waiting request for the version, and start fetching it."""
        version.waiting += 1
        version.tenant = tenant
        self._want(version)

    def ready(self, version: AdapterVersion) -> bool:
        """Whether it is in a slot, or needs nothing but a free one."""
        return version.slot is not None or version in self._host

    def lacks_memory(self, version: AdapterVersion) -> bool:
        """Whether it is not read because there is no host memory for it.

        On the CPU, the copies to which slots in use refer make no room.
        """
        there = self.ready(version) or version in self._loading
        return not there and len(self._loading) < _READS_AT_ONCE

    def urge(self, version: AdapterVersion) -> None:
        """Have a version read next, instead of any that requests wait for and none is running with.

        That holds until a request with it runs.
        """
        if version not in self._urgent:
            logger.warning(
                "adapter %s waits for host memory that adapters of running requests hold: others "
                "wait until it is read; --lora-host-memory gives more",
                version.name,
            )
            self._urgent.add(version)
            self._want(version)
        if version.tenant in self._wanted and version in self._wanted[version.tenant]:
            self._wanted[version.tenant].move_to_end(version, last=False)
            self._wanted.move_to_end(version.tenant, last=False)
            self._start_loading()

    def can_acquire(
        self, version: AdapterVersion, *, instead_of: AdapterVersion | None = None
    ) -> bool:
        """Whether :meth:`acquire` would succeed now.

        instead_of: counts as if no running request used it.
        """
        if version.slot is not None:
            return True
        if version not in self._host or self.filled_in_step:
            return False
        return self._slots_for(version, instead_of) is not None

    def acquire(self, version: AdapterVersion) -> bool:
        """Pin the version in a slot for a request that starts running; False if none is free."""
        evicted = self._fill(version) if version.slot is None else []
        if evicted is None:
            return False
        assert version.slot is not None
        self._in_slot.move_to_end(version.slot)
        version.waiting -= 1
        version.running += 1
        self._urgent.discard(version)
        for each in evicted:
            if each.waiting:
                self._want(each)
        self._start_loading()
        return True

    def preempt(self, version: AdapterVersion, tenant: str) -> None:
        """Count a running request as waiting again."""
        version.running -= 1
        self.queue(version, tenant)

    def release(self, version: AdapterVersion, *, running: bool) -> None:
        """Count a request out; running: whether it was running or still waiting."""
        if running:
            version.running -= 1
        else:
            version.waiting -= 1
        if not version.waiting:
            self._urgent.discard(version)
        self._forget_if_unused(version)
        self._start_loading()

    def pin(self, version: AdapterVersion, pinned: bool) -> None:
        """Have a version stay in host memory while there is room, beginning now, or no longer."""
        version.pinned = pinned and not version.retired
        if version.pinned:
            self._want(version)
        else:
            self._start_loading()  # its copy can make room now

    def prefetch(self, version: AdapterVersion) -> None:
        """Read a version that requests are expected for, unless only copies in need make room."""
        if version.retired:
            return
        if version in self._host:
            self._host.move_to_end(version)
        elif not self.ready(version):
            self._expected.add(version)
            self._want(version)

    def retire(self, version: AdapterVersion) -> None:
        """Mark the version as replaced or unloaded. Requests that use it keep it."""
        version.retired = True
        self._expected.discard(version)
        version.pinned = False
        self._forget_if_unused(version)

    def offer(self, version: AdapterVersion, staged: StagedAdapter) -> None:
        """Keep a copy that was read for the load check, if there is room without evicting."""
        if self._free_bytes >= staged.nbytes and not self.ready(version):
            self._free_bytes -= staged.nbytes
            self._keep(version, staged)

    def staged(self, version: AdapterVersion, staged: StagedAdapter) -> None:
        """``load`` has read the version."""
        self._loading.remove(version)
        self._keep(version, staged)
        self._forget_if_unused(version)
        self._start_loading()

    def failed(self, version: AdapterVersion) -> None:
        """``load`` could not read the version."""
        self._loading.remove(version)
        self._free_bytes += version.nbytes
        self._start_loading()

    def _keep(self, version: AdapterVersion, staged: StagedAdapter) -> None:
        self._host[version] = staged
        version.in_host = True

    def _want(self, version: AdapterVersion) -> None:
        there = version in self._host if version.pinned else self.ready(version)
        if not there and version not in self._loading:
            self._wanted.setdefault(version.tenant, OrderedDict())[version] = None
            self._start_loading()

    def _start_loading(self) -> None:
        """Start reading wanted versions, tenants in turn, while host memory lasts."""
        while len(self._loading) < _READS_AT_ONCE:
            tenant = next((t for t in list(self._wanted) if self._start_one(t)), None)
            if tenant is None:
                return
            self._wanted.move_to_end(tenant)

    def _start_one(self, tenant: str) -> bool:
        """Start reading the first version a tenant wants; False if none or no room for it."""
        queue = self._wanted[tenant]
        while queue:
            version = next(iter(queue))
            if self._needs_reading(version):
                if self._make_room(version):
                    break
                if not self._is_only_expected(version):
                    return False
            self._expected.discard(version)
            del queue[version]
        else:
            del self._wanted[tenant]
            return False
        self._expected.discard(version)
        del queue[version]
        self._free_bytes -= version.nbytes
        self._loading.add(version)
        self._load(version)
        return True

    def _needs_reading(self, version: AdapterVersion) -> bool:
        pinned = version.pinned and version not in self._host
        wanted = version.waiting or pinned or version in self._expected
        there = version in self._host if version.pinned else self.ready(version)
        return bool(wanted) and not there and version not in self._loading

    def _is_only_expected(self, version: AdapterVersion) -> bool:
        return version in self._expected and not (version.waiting or version.pinned)

    def _make_room(self, newcomer: AdapterVersion) -> bool:
        """Drop host copies until the newcomer fits. If it cannot fit, drop none and return False.

        Copies that no queued request needs go first. Then come copies of a tenant which, after
        losing one, still holds at least as many bytes as the newcomer's tenant would, or of any
        tenant if the newcomer is urgent and they are not. Pinned ones go last. For one that no
        request waits for, only the first go.
        """
        free, dropped = self._free_bytes, []
        held: Counter[str] = Counter()
        for version in (*self._host, *self._loading):
            if self._needed(version):
                held[version.tenant] += version.nbytes
        mine = held[newcomer.tenant] + newcomer.nbytes
        # A retired version's files may be gone from disk, so its copy is kept while in use. So is
        # one that a slot in use refers to.
        replaceable = (
            v
            for v in self._host
            if not (v.retired and (v.waiting or v.running))
            and not (self._slot_refers_to(v) and v.running)
        )
        by_use = sorted(replaceable, key=lambda v: (v.pinned, self._needed(v)))
        for version in by_use:
            needed = version.pinned or self._needed(version)
            if free >= newcomer.nbytes or (needed and self._is_only_expected(newcomer)):
                break
            if self._needed(version):
                urgent = newcomer in self._urgent and version not in self._urgent
                if not urgent and held[version.tenant] - version.nbytes < mine:
                    continue
                held[version.tenant] -= version.nbytes
            free += version.nbytes
            dropped.append(version)
        if free < newcomer.nbytes:
            return False
        for version in dropped:
            self._drop(version)
            if self._needed(version):
                self._wanted.setdefault(version.tenant, OrderedDict())[version] = None
        return True

    def _needed(self, version: AdapterVersion) -> bool:
        """Whether requests wait for it that could not run without its host copy."""
        return version.waiting > 0 and (version.slot is None or self._slot_refers_to(version))

    def _drop(self, version: AdapterVersion) -> None:
        refers = self._slot_refers_to(version)
        del self._host[version]
        version.in_host = False
        self._free_bytes += version.nbytes
        if refers and version.slot is not None:
            self._empty(version.slot)

    def _slot_refers_to(self, version: AdapterVersion) -> bool:
        """Whether the version's slot is of no use without its host copy."""
        if version.slot is None or version not in self._host:
            return False
        return self._slots.refer_to_host or self._host[version].ends is not None

    def _fill(self, version: AdapterVersion) -> list[AdapterVersion] | None:
        """Put the version into a slot. Returns those that were there; None if it cannot be now."""
        staged = self._host.get(version)
        if staged is None:
            self._want(version)
            return None
        if self.filled_in_step:
            return None
        slots = self._slots_for(version)
        if slots is None:
            return None
        slot, *others = slots
        evicted = [held for each in slots if (held := self._in_slot[each]) is not None]
        for each in others:
            self._empty(each)
        if (held := self._in_slot[slot]) is not None:
            held.slot = None
        self._slots.fill(slot, staged)
        self.filled_in_step = True
        self._host.move_to_end(version)
        self._in_slot[slot] = version
        version.slot = slot
        return evicted

    def _slots_for(
        self, version: AdapterVersion, instead_of: AdapterVersion | None = None
    ) -> list[int] | None:
        """The slot to overwrite, and others to empty if it takes more memory than is free.

        None if running requests use every slot, or too much of the memory.

        In order of preference: an empty slot, or the least recently used of an adapter without
        requests; then the least recently used of an adapter that only waiting requests want; then
        that of a pinned one.
        """

        def worth(slot: int) -> tuple[bool, bool]:
            held = self._in_slot[slot]
            return (False, False) if held is None else (held.pinned, held.waiting > 0)

        free, wanted = self._slots.free_bytes, self._slots.bytes_for(self._host[version])
        first, held_there = next(iter(self._in_slot.items()))
        if held_there is None and free >= wanted:
            return [first]  # the empty ones come first
        idle = [
            slot
            for slot, held in self._in_slot.items()
            if held is None or held is instead_of or not held.running
        ]
        found: list[int] = []
        for slot in sorted(idle, key=worth):
            if found and free >= wanted:
                break
            found.append(slot)
            free += self._slots.bytes_in(slot)
        return found if found and free >= wanted else None

    def _forget_if_unused(self, version: AdapterVersion) -> None:
        if not version.retired or version.waiting or version.running:
            return
        if version in self._host:
            self._drop(version)
        # A version retired before an engine restart still has its old slot number, which may now
        # belong to another.
        if version.slot is not None and self._in_slot[version.slot] is version:
            self._empty(version.slot)

    def _empty(self, slot: int) -> None:
        """Let go of what is in a slot that is not in use."""
        held = self._in_slot[slot]
        if held is not None:
            held.slot = None
        self._in_slot[slot] = None
        self._in_slot.move_to_end(slot, last=False)
        self._slots.clear(slot)
