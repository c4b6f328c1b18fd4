"""Adapters by name, and which of them are in host memory and in device slots.

Three tiers: the adapter's folder on disk, a staged copy in host memory, a slot on the device. Each
upper tier keeps what was used last. Names may be loaded and unloaded from any thread; residency is
the engine thread's alone. Reading from disk happens on a thread of its own, beginning when a
request queues; the engine thread only copies a staged adapter into a slot, one in a step at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nybble.engine.adapter_slots import AdapterSlots, StagedAdapter
from nybble.engine.request import ParameterError
from nybble.loaders import AdapterError, load_adapter, resolve_adapter

logger = logging.getLogger(__name__)

Residency = Literal["device", "host", "disk"]
_NAMES_IN_ERRORS = 10


@dataclass(eq=False)
class AdapterVersion:
    """What a name stood for when it was loaded; a request keeps the version it began with.

    waiting, running: the requests that use it. slot: where it is on the device, None if nowhere.
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
    slot: int | None = None
    in_host: bool = False
    retired: bool = False

    @property
    def residency(self) -> Residency:
        return "device" if self.slot is not None else "host" if self.in_host else "disk"


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter as an administrator sees it.

    version: digest of its files' content. nbytes: what it takes in host memory. loaded: when, in
    seconds since 1970. hits: requests so far. running, waiting: requests now.
    """

    name: str
    path: str
    version: str
    rank: int
    nbytes: int
    residency: Residency
    loaded: int
    hits: int
    running: int
    waiting: int

    @classmethod
    def of(cls, version: AdapterVersion) -> AdapterInfo:
        return cls(
            name=version.name,
            path=str(version.folder),
            version=version.digest.hex(),
            rank=version.rank,
            nbytes=version.nbytes,
            residency=version.residency,
            loaded=version.loaded,
            hits=version.hits,
            running=version.running,
            waiting=version.waiting,
        )


class AdapterCache:
    """Host copies and device slots; for the engine thread alone."""

    def __init__(
        self, slots: AdapterSlots, host_bytes: int, load: Callable[[AdapterVersion], None]
    ) -> None:
        """load: begins to read a version from disk; ``staged`` or ``failed`` is its answer."""
        self._slots = slots
        self._free_bytes = host_bytes
        self._load = load
        self._host: OrderedDict[AdapterVersion, StagedAdapter] = OrderedDict()
        self._loading: set[AdapterVersion] = set()
        self._wanted: OrderedDict[AdapterVersion, None] = OrderedDict()
        # Least recently used first.
        self._in_slot: OrderedDict[int, AdapterVersion | None] = OrderedDict.fromkeys(
            range(slots.count)
        )
        self._filled_in_step = False

    def begin_step(self) -> None:
        self._filled_in_step = False

    def queue(self, version: AdapterVersion) -> None:
        """A request for the version waits: fetch it."""
        version.waiting += 1
        self._want(version)

    def ready(self, version: AdapterVersion) -> bool:
        """Whether nothing but a free slot is needed to run it."""
        return version.slot is not None or version in self._host

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

    def preempt(self, version: AdapterVersion) -> None:
        """A running request waits again."""
        version.running -= 1
        self.queue(version)

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
            self._wanted[version] = None
            self._start_loading()

    def _start_loading(self) -> None:
        """Begin to read what is wanted, in order, as far as host memory goes."""
        while self._wanted:
            version = next(iter(self._wanted))
            if version.waiting and not self.ready(version) and version not in self._loading:
                if not self._make_room(version.nbytes):
                    return
                self._free_bytes -= version.nbytes
                self._loading.add(version)
                self._load(version)
            del self._wanted[version]

    def _make_room(self, nbytes: int) -> bool:
        """Drop host copies no queued request needs until ``nbytes`` are free, or none at all."""
        free, dropped = self._free_bytes, []
        for version in self._host:
            if free >= nbytes:
                break
            if version.slot is not None or not version.waiting:
                free += version.nbytes
                dropped.append(version)
        if free < nbytes:
            return False
        for version in dropped:
            self._drop(version)
        return True

    def _drop(self, version: AdapterVersion) -> None:
        del self._host[version]
        version.in_host = False
        self._free_bytes += version.nbytes

    def _fill(self, version: AdapterVersion) -> bool:
        staged = self._host.get(version)
        if staged is None:
            self._want(version)
            return False
        if self._filled_in_step:
            return False
        slot = self._least_useful_slot()
        if slot is None:
            return False
        evicted = self._in_slot[slot]
        if evicted is not None:
            evicted.slot = None
            if evicted.waiting:
                self._want(evicted)
        self._slots.fill(slot, staged)
        self._filled_in_step = True
        self._host.move_to_end(version)
        self._in_slot[slot] = version
        version.slot = slot
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


@dataclass
class AdapterRegistry:
    """Names to versions, from any thread.

    post: runs a function on the engine thread, in the order of the calls. on_failure: runs there
    when a version that requests wait for can no longer be read.
    """

    slots: AdapterSlots
    host_bytes: int
    post: Callable[[Callable[[], None]], None]
    on_failure: Callable[[AdapterVersion, AdapterError], None]
    _versions: dict[str, AdapterVersion] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.cache = self._empty_cache()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="nybble-adapters")

    def load(self, name: str, path: str, *, replace: bool) -> AdapterInfo:
        """Read and check an adapter and put it behind ``name``, replacing what was there at once.

        path: a folder or hub name. Requests that have begun keep the version they began with.
        Raises AdapterError and changes nothing where the adapter does not fit, and where the name
        is taken and not to be replaced.
        """
        if not name:
            raise AdapterError("an adapter needs a name")
        if not replace:
            self._refuse_taken(name)  # before reading, and again after it
        folder = resolve_adapter(path)
        version, staged = self._read(name, folder)
        with self._lock:
            if not replace:
                self._refuse_taken(name)
            before = self._versions.get(name)
            if before is not None:
                version.hits = before.hits
                self.post(lambda: self.cache.retire(before))
            self._versions[name] = version
            self.post(lambda: self.cache.offer(version, staged))
        return AdapterInfo.of(version)

    def unload(self, name: str) -> None:
        """Take the name away; requests that have begun finish. Raises ParameterError."""
        with self._lock:
            version = self._find(name)
            del self._versions[name]
            self.post(lambda: self.cache.retire(version))

    def info(self, name: str) -> AdapterInfo | None:
        """The adapter behind a name."""
        version = self._versions.get(name)
        return None if version is None else AdapterInfo.of(version)

    def infos(self) -> list[AdapterInfo]:
        """Every loaded adapter, by name."""
        with self._lock:
            return [AdapterInfo.of(self._versions[name]) for name in sorted(self._versions)]

    def submit(self, name: str, send: Callable[[AdapterVersion], None]) -> None:
        """Call ``send`` with the version behind the name, before any retirement of it is posted.

        Raises ParameterError for an unknown name.
        """
        with self._lock:
            version = self._find(name)
            version.hits += 1
            send(version)

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

    def restart(self) -> None:
        """Keep every name and forget what is resident: the engine begins again without requests."""
        with self._lock:
            for version in self._versions.values():
                version.waiting = version.running = 0
                version.slot, version.in_host = None, False
            self.cache = self._empty_cache()

    def _empty_cache(self) -> AdapterCache:
        cache: AdapterCache
        cache = AdapterCache(self.slots, self.host_bytes, lambda v: self._load_later(v, cache))
        return cache

    def _refuse_taken(self, name: str) -> None:
        if name in self._versions:
            raise AdapterError(f"adapter {name!r} is loaded already: replace it or unload it first")

    def _find(self, name: str) -> AdapterVersion:
        version = self._versions.get(name)
        if version is None:
            names = sorted(self._versions)
            known = ", ".join(names[:_NAMES_IN_ERRORS]) or "none"
            if len(names) > _NAMES_IN_ERRORS:
                known += f" and {len(names) - _NAMES_IN_ERRORS} more"
            raise ParameterError("adapter", f"adapter {name!r} is not loaded; loaded: {known}")
        return version

    def _read(self, name: str, folder: Path) -> tuple[AdapterVersion, StagedAdapter]:
        adapter = load_adapter(folder, self.slots.shapes)
        if adapter.rank > self.slots.max_rank:
            raise AdapterError(
                f"{folder} has rank {adapter.rank}, but this server holds adapters up to rank "
                f"{self.slots.max_rank}: raise its maximum rank"
            )
        staged = self.slots.stage(adapter)
        if staged.nbytes > self.host_bytes:
            raise AdapterError(
                f"{folder} takes {staged.nbytes} bytes, but the host memory for adapters is "
                f"{self.host_bytes}: raise it"
            )
        version = AdapterVersion(name, folder, adapter.digest, adapter.rank, staged.nbytes)
        return version, staged

    def _load_later(self, version: AdapterVersion, cache: AdapterCache) -> None:
        def answer(function: Callable[[], None]) -> None:
            # A cache from before a restart awaits nothing any more.
            self.post(lambda: function() if cache is self.cache else None)

        def read() -> None:
            try:
                again, staged = self._read(version.name, version.folder)
                if again.digest != version.digest:
                    raise AdapterError(
                        f"{version.folder} has changed since adapter {version.name!r} was loaded "
                        "from it: load it again"
                    )
            except Exception as error:  # whatever it is, requests must not wait for ever
                if not isinstance(error, AdapterError | OSError):
                    logger.exception("reading adapter %s failed", version.name)
                failure = error if isinstance(error, AdapterError) else AdapterError(str(error))
                answer(lambda: self._failed(version, failure))
            else:
                answer(lambda: cache.staged(version, staged))

        self._reader.submit(read)

    def _failed(self, version: AdapterVersion, error: AdapterError) -> None:
        self.cache.failed(version)
        self.on_failure(version, error)
