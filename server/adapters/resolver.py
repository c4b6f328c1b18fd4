"""Serves adapters which are in shared places, by looking a name up when a request first has it.

Nothing is read at the start. A found adapter is copied to a bounded cache on disk and loaded by
other threads, while its requests wait. The places are asked again every few seconds about names
that are in use, so that a version published by one server is served by all of them. If a place does
not answer, what is loaded is served on, and requests for other names get 503.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Middleware

from nybble.engine import AdapterError, AdapterInfo, Engine, ParameterError
from nybble.loaders.adapter import content_digest, own_files
from nybble.server.adapters.archive import CONFIG, WEIGHTS
from nybble.server.adapters.disk_cache import AdapterDiskCache, CacheFullError
from nybble.server.adapters.names import is_name
from nybble.server.adapters.places import AdapterRegistry, Found, Place, PlaceError
from nybble.server.adapters.turns import Turns
from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError, is_full_disk
from nybble.server.lifecycle.flag_names import in_flags
from nybble.server.observability.exposition import CounterSeries, Family, counter

logger = logging.getLogger(__name__)

# What a request's adapters are held by until it ends.
LEASES = web.RequestKey("leases", ExitStack)

_LOOKUPS_AT_ONCE, _FETCHES_AT_ONCE = 16, 4
_MOST_PENDING = 256
_MOST_ABSENT = 10_000
_WAIT_SECONDS = 120.0


@dataclass(eq=False)
class Held:
    """An adapter of a shared place that the engine has loaded.

    folder: in the cache on disk.
    checked: when its place was last asked, by the monotonic clock.
    used: whether a request has had it since then.
    leases: requests that have it now.
    """

    found: Found
    folder: Path
    checked: float
    used: bool = True
    leases: int = 0


class ResolverMetrics:
    """Counts for operators."""

    def __init__(self) -> None:
        self.lookups = counter(
            "nybble_adapter_lookups",
            "Questions to shared places of adapters, by answer: found, absent or error.",
            ["result"],
        )
        self.fetched_bytes = counter(
            "nybble_adapter_fetched_bytes", "Bytes copied from shared places to the cache.", []
        )
        self.evictions = counter(
            "nybble_adapter_cache_evictions", "Adapters removed from the cache on disk.", []
        )
        for result in ("found", "absent", "error"):
            self.lookups.labels(result)
        self.fetched_bytes.labels()
        self.evictions.labels()

    @property
    def families(self) -> Sequence[Family[CounterSeries]]:
        return (self.lookups, self.fetched_bytes, self.evictions)


class AdapterResolver:
    """Handlers run on one event loop; reading and loading on threads of its own."""

    def __init__(
        self,
        engine: Engine,
        models: Sequence[str],
        sources: Sequence[Place],
        registry: AdapterRegistry | None,
        cache: AdapterDiskCache,
        *,
        refresh_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """models: names that no adapter may have.

        sources: asked in this order, after the registry.
        refresh_seconds: after so long an answer of a place is asked for again.
        """
        self._engine = engine
        self._models = frozenset(models)
        self.registry = registry
        self._places = [*([] if registry is None else [registry]), *sources]
        self._cache = cache
        self._refresh_seconds = refresh_seconds
        self._clock = clock
        self.metrics = ResolverMetrics()
        cache.may_remove = self._give_up
        self._lookers = ThreadPoolExecutor(_LOOKUPS_AT_ONCE, thread_name_prefix="nybble-lookup")
        self._fetchers = ThreadPoolExecutor(_FETCHES_AT_ONCE, thread_name_prefix="nybble-fetch")
        self._lock = threading.Lock()
        self._turns = Turns()  # so that what is held is what the engine has
        self._held: dict[str, Held] = {}
        # Replaced versions which requests still have, and versions being loaded, by cache key.
        self._draining: dict[str, Held] = {}
        self._installing: set[str] = set()
        self._fetched = 0
        # Since when a name is absent, and what was wrong with a version.
        self._absent: OrderedDict[str, float] = OrderedDict()
        self._broken: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._pending: dict[str, asyncio.Task[bool]] = {}

    # On the event loop.

    def covers(self, name: str) -> bool:
        """Whether a name may be looked for."""
        return name not in self._models and any(place.covers(name) for place in self._places)

    async def obtain(self, name: str, leases: ExitStack | None = None) -> bool:
        """Whether an adapter of this name is loaded, after looking for it if need be.

        leases: holds the adapter until it is closed.

        Raises ApiError if it exists but cannot be served now, or at all.
        """
        if not self.covers(name):
            return self._engine.adapter(name) is not None
        held = self._held.get(name)
        if held is None and self._engine.adapter(name) is not None:
            return True  # it was loaded in another way, which takes precedence
        fresh = held is not None and self._clock() - held.checked <= self._refresh_seconds
        if fresh and self._lease(name, leases):
            return True
        since = self._absent.get(name)
        if since is not None and self._clock() - since <= self._refresh_seconds:
            return False
        task = self._pending.get(name)
        if task is None:
            if len(self._pending) >= _MOST_PENDING:
                raise ApiError(
                    503,
                    f"{len(self._pending)} adapters are being looked for already",
                    code="overloaded",
                    retry_after=retry_after.BUSY,
                )
            task = self._start(name)
        try:
            # A client that goes away does not stop it: others may wait, and it may come again.
            exists = await asyncio.wait_for(asyncio.shield(task), _WAIT_SECONDS)
        except TimeoutError:
            raise ApiError(
                503,
                f"adapter {name!r} is still being read",
                code="adapter_loading",
                retry_after=retry_after.BUSY,
            ) from None
        if exists and not self._lease(name, leases):
            raise ApiError(
                503,
                f"adapter {name!r} was pushed out of the cache by others as soon as it was read",
                code="adapter_unavailable",
                retry_after=retry_after.BUSY,
            )
        return exists

    async def lifespan(self, _: web.Application) -> AsyncGenerator[None]:
        """Ask again about names in use while the application runs."""
        task = asyncio.create_task(self._refresh())
        yield
        task.cancel()
        for pending in list(self._pending.values()):
            pending.cancel()
        for pool in (self._lookers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
        self._cache.close()

    def middleware(self) -> Middleware:
        """Gives each request leases which end with it."""

        @web.middleware
        async def middleware(
            request: web.Request,
            handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
        ) -> web.StreamResponse:
            with ExitStack() as leases:
                request[LEASES] = leases
                return await handler(request)

        return middleware

    def _lease(self, name: str, leases: ExitStack | None) -> bool:
        with self._lock:
            held = self._held.get(name)
            if held is None:
                return self._engine.adapter(name) is not None
            held.used = True
            if leases is not None:
                held.leases += 1
                leases.callback(self._end_lease, held)
            return True

    def _end_lease(self, held: Held) -> None:
        with self._lock:
            held.leases -= 1

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds / 2)
            for name, held in list(self._held.items()):
                due = self._clock() - held.checked >= self._refresh_seconds / 2
                if due and (held.used or held.leases) and name not in self._pending:
                    held.used = False
                    self._start(name)

    def _start(self, name: str) -> asyncio.Task[bool]:
        def ended(task: asyncio.Task[bool]) -> None:
            del self._pending[name]
            if not task.cancelled():
                task.exception()  # for those that still wait, if any do

        task = self._pending[name] = asyncio.create_task(self._resolve(name))
        task.add_done_callback(ended)
        return task

    async def _resolve(self, name: str) -> bool:
        """Make the engine serve what the places have under this name; whether they have it."""
        loop = asyncio.get_running_loop()
        held = self._held.get(name)
        try:
            found = await loop.run_in_executor(self._lookers, self._find, name)
        except PlaceError as error:
            self.metrics.lookups.labels("error").inc()
            if held is not None:
                logger.warning("adapter %s is served as it was: %s", name, error)
                held.checked = self._clock()
                return True
            raise self._unavailable(name, error) from None
        self.metrics.lookups.labels("absent" if found is None else "found").inc()
        if found is None:
            await loop.run_in_executor(self._fetchers, self._drop, name)
            self._remember_absent(name)
            return False
        if held is not None and held.found == found and self._engine.adapter(name) is not None:
            held.checked = self._clock()
            return True
        if (broken := self._broken.get(name)) is not None and broken[0] == found.revision:
            return self._not_served(name, held, broken[1])
        try:
            await loop.run_in_executor(self._fetchers, self._install, found, None)
        except (AdapterError, ParameterError) as error:
            if not isinstance(error, ParameterError):
                logger.error(
                    "adapter %s of %s cannot be served: %s", name, found.folder, in_flags(error)
                )
            self._broken[name] = (found.revision, in_flags(error))
            while len(self._broken) > _MOST_ABSENT:
                self._broken.popitem(last=False)
            return self._not_served(name, held, in_flags(error))
        except FileNotFoundError:  # removed meanwhile
            self._remember_absent(name)
            return False
        except (PlaceError, CacheFullError, OSError) as error:
            if held is not None:
                logger.warning("adapter %s is served as it was: %s", name, error)
                held.checked = self._clock()
                return True
            if is_full_disk(error):  # the cache's: the place has the adapter
                raise
            raise self._unavailable(name, error) from None
        finally:
            self._count()
        return True

    def _not_served(self, name: str, held: Held | None, reason: str) -> bool:
        """A version that cannot be loaded: the one before it stays, if there is one."""
        if held is not None:
            held.checked = self._clock()
            return True
        raise ApiError(400, f"adapter {name!r} cannot be served: {reason}", code="invalid_adapter")

    def _unavailable(self, name: str, error: Exception) -> ApiError:
        logger.warning("adapter %s cannot be had: %s", name, error)
        return ApiError(
            503,
            f"adapter {name!r} cannot be had now: {error}",
            code="adapter_unavailable",
            retry_after=retry_after.UNAVAILABLE,
        )

    def _remember_absent(self, name: str) -> None:
        self._absent[name] = self._clock()
        self._absent.move_to_end(name)
        while len(self._absent) > _MOST_ABSENT:
            self._absent.popitem(last=False)

    def _count(self) -> None:
        """Count what other threads have done: metrics belong to the event loop."""
        with self._lock:
            fetched, self._fetched = self._fetched, 0
        self.metrics.fetched_bytes.labels().inc(fetched)
        self.metrics.evictions.labels().inc(self._cache.take_evictions())

    # On other threads.

    def scratch(self) -> AbstractContextManager[Path]:
        """A folder to receive an adapter's files in, which is removed afterwards."""
        return self._cache.scratch()

    def publish(self, name: str, folder: Path, *, replace: bool) -> AdapterInfo:
        """Serve a local folder's adapter under this name here, and at all servers soon. Blocks.

        Raises AdapterError if it does not fit or the name is taken, ApiError if the registry cannot
        be written.
        """
        registry = self.registry
        assert registry is not None
        with _told():
            if not replace and registry.find(name) is not None:
                raise AdapterError(
                    f"adapter {name!r} is in the registry already: replace it or unload it first"
                )
            for file in (CONFIG, WEIGHTS):
                if not (folder / file).is_file():
                    raise AdapterError(f"{folder} has no {file}")
            found = registry.store(name, folder)
            info = self._install(found, folder)
            try:
                registry.point(found)
            except PlaceError:
                self._drop(name)  # the registry's own version is found again when asked for
                raise
        self._absent.pop(name, None)
        self._broken.pop(name, None)
        return info

    def withdraw(self, name: str, *, delete: bool) -> bool:
        """End the name here, and at all servers soon; False if no shared place has it. Blocks.

        delete: remove its files as well.
        """
        registry = self.registry
        with _told():
            held = self._held.get(name)
            if held is not None and held.found.place is not registry:
                raise ApiError(
                    400,
                    f"adapter {name!r} comes from {held.found.folder}: remove it there",
                    param="lora_name",
                    code="not_in_registry",
                )
            if registry is None or not is_name(name):
                return False
            if held is None and registry.find(name) is None:
                return False
            (registry.delete if delete else registry.withdraw)(name)
        self._drop(name)
        return True

    def _find(self, name: str) -> Found | None:
        for place in self._places:
            if place.covers(name) and (found := place.find(name)) is not None:
                return found
        return None

    def _install(self, found: Found, local: Path | None) -> AdapterInfo:
        """Load a version, from the cache if it is there.

        local: a folder with its files; None to fetch them.
        """
        name, key = found.name, found.key

        def fill(folder: Path) -> None:
            if local is None:
                found.fetch(folder)
                with self._lock:
                    self._fetched += found.nbytes
                return
            for file in (CONFIG, WEIGHTS, *own_files(local)):
                shutil.copyfile(local / file, folder / file)
            if content_digest(folder) != found.digest:
                raise AdapterError(f"{local} changed while it was read: load it again")

        with self._lock:
            self._installing.add(key)
        try:
            folder = self._cache.add(key, found.nbytes, fill)
            with self._turns.of(name):
                info = self._engine.load_adapter(name, str(folder), replace=True)
                with self._lock:
                    before = self._held.get(name)
                    self._held[name] = Held(found, folder, self._clock())
                    if before is not None and before.found.key != key:
                        self._draining[before.found.key] = before
            logger.info("adapter %s is loaded from %s", name, found.folder)
            return info
        finally:
            with self._lock:
                self._installing.discard(key)

    def _drop(self, name: str) -> None:
        """Unload a name which no shared place has any more."""
        with self._turns.of(name):
            with self._lock:
                held = self._held.pop(name, None)
                if held is None:
                    return
                self._draining[held.found.key] = held
            with suppress(ParameterError):  # unloaded by hand already
                self._engine.unload_adapter(name)
        logger.info("adapter %s was removed: unloaded", name)

    def _give_up(self, key: str) -> bool:
        """Unload an adapter whose files are to go, unless something uses it."""
        with self._lock:
            if key in self._installing:
                return False
            if (old := self._draining.get(key)) is not None:
                if old.leases:
                    return False
                del self._draining[key]
            held = next((each for each in self._held.values() if each.found.key == key), None)
            if held is None:
                return True  # replaced, or left from an earlier start
            name = held.found.name
            info = self._engine.adapter(name)
            if held.leases or (info is not None and info.running + info.waiting):
                return False
            del self._held[name]
            with suppress(ParameterError):
                self._engine.unload_adapter(name)
            return True


@contextmanager
def _told() -> Iterator[None]:
    """Turns the errors of a place into ApiError."""
    try:
        yield
    except (PlaceError, CacheFullError) as error:
        raise ApiError(
            503, str(error), code="adapter_unavailable", retry_after=retry_after.UNAVAILABLE
        ) from error
