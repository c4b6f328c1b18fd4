"""Adapters by name, loaded and unloaded from any thread.

A thread of its own reads from disk. :mod:`nybble.engine.adapter_cache` decides which adapters stay
in host memory and on the device.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

from nybble.engine.adapter_cache import AdapterCache, AdapterVersion, MixturePart, Residency
from nybble.engine.adapter_slots import AdapterSlots, StagedAdapter
from nybble.engine.generation_config import own_end_tokens, sampling_defaults
from nybble.engine.request import AdapterMixture, ParameterError, UnknownAdapterError
from nybble.engine.tokens import AdapterTokens, Tokens
from nybble.loaders import AdapterError, load_adapter, resolve_adapter
from nybble.loaders.adapter_combine import combine_adapters, combined_digest, not_a_sum
from nybble.loaders.adapter_settings import OwnSettings, read_own_settings

logger = logging.getLogger(__name__)

_NAMES_IN_ERRORS = 10
# Mixtures that requests have asked for and that are kept for the next such request.
_MIXTURES = 256
# Earlier versions that are known of a name, and names of which any are.
_EARLIER = 8
_EARLIER_NAMES = 1000
_TENANTS = 100  # that are listed for an adapter
_MixtureKey = tuple[AdapterMixture | AdapterVersion, ...]


class AdapterConflictError(AdapterError):
    """An adapter has another version than the caller expected."""


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter as an administrator sees it.

    version: digest of its files' content, in hexadecimal.
    nbytes: size in host memory.
    residency: the uppermost tier it is in.
    loaded: when, in seconds since 1970.
    hits: requests so far.
    running: running requests.
    waiting: queued requests.
    last_used: when a request last asked for it, in seconds since 1970; None if none has.
    tenants: those whose requests have asked for it, sorted; of many only some.
    own_template: whether it has a chat template of its own.
    own_tokens: how many tokens it has that the base model does not have.
    sampling: what it recommends for requests that name no value; None for what the base does.
    pinned: whether it stays in host memory while others can make room.
    mixture: the weights of the adapters it was mixed of, by name; None if it was not mixed. It then
        has no path.
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
    last_used: int | None = None
    tenants: tuple[str, ...] = ()
    own_template: bool = False
    own_tokens: int = 0
    sampling: Mapping[str, float] | None = None
    pinned: bool = False
    mixture: Mapping[str, float] | None = None

    @classmethod
    def of(cls, version: AdapterVersion) -> AdapterInfo:
        return cls(
            name=version.name,
            path="" if version.parts else str(version.folder),
            version=version.digest.hex(),
            rank=version.rank,
            nbytes=version.nbytes,
            residency=version.residency,
            loaded=version.loaded,
            hits=version.hits,
            running=version.running,
            waiting=version.waiting,
            last_used=version.last_used,
            tenants=tuple(sorted(version.tenants)),
            own_template=version.template is not None,
            own_tokens=0 if version.tokens is None else version.tokens.added,
            sampling=version.sampling,
            pinned=version.pinned,
            mixture={part.name: part.weight for part in version.parts} or None,
        )


@dataclass(frozen=True)
class AdapterUsage:
    """Where the loaded adapters are, in less time than :class:`AdapterInfo` of each takes.

    slots: on the device; 0 if adapters are off.
    device, host, disk: how many adapters have this as their uppermost tier.
    in_slots: names of the adapters on the device.
    waiting: names of the adapters that queued requests use.
    """

    slots: int = 0
    device: int = 0
    host: int = 0
    disk: int = 0
    in_slots: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


@dataclass
class AdapterRegistry:
    """Maps names to adapter versions. May be used from any thread.

    host_bytes: memory for host copies.
    own_settings: whether adapters' own chat templates, generation configs and tokenizers are read.
    tokens: the base model's.
    post: runs a function on the engine thread, in the order of the calls.
    on_failure: called on the engine thread if a version that requests wait for cannot be read.
    prepare: called with an adapter's own tokens before it is served, on the thread that loads it.
    """

    slots: AdapterSlots
    host_bytes: int
    own_settings: bool
    tokens: Tokens
    post: Callable[[Callable[[], None]], None]
    on_failure: Callable[[AdapterVersion, AdapterError], None]
    prepare: Callable[[Tokens], None] = lambda tokens: None
    _versions: dict[str, AdapterVersion] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    # What names stood for before, the oldest first; the name that changed last comes last.
    _earlier: OrderedDict[str, list[AdapterVersion]] = field(default_factory=OrderedDict)
    # By the mixture and the versions of its adapters; the one last asked for comes last.
    _mixtures: OrderedDict[_MixtureKey, AdapterVersion] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._own_tokens = AdapterTokens(self.tokens, reads=self.own_settings)
        self.cache = self._empty_cache()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="nybble-adapters")

    def load(
        self, name: str, path: str, *, replace: bool, expected: str | None = None
    ) -> AdapterInfo:
        """Read and check an adapter, then serve it as ``name``.

        path: a folder or hub name.
        replace: whether the name may be taken already; requests that have begun keep the version
            they began with.
        expected: the version that it is to replace; None for any or none.

        Raises AdapterError, and changes nothing, if the adapter does not fit the model or the
        limits, or if the name is taken and ``replace`` is false, and AdapterConflictError if the
        name has another version than is expected.
        """
        self._check_name(name, replace, expected)  # before reading, and again after it
        folder = resolve_adapter(path)
        return self._serve(*self._read(name, folder), replace=replace, expected=expected)

    def load_mixture(
        self, name: str, mixture: AdapterMixture, *, replace: bool, expected: str | None = None
    ) -> AdapterInfo:
        """Serve a mixture of loaded adapters, as they are now, as ``name``; see :meth:`load`.

        Raises AdapterError too, if the files of an adapter have changed since it was loaded, and
        ParameterError if one is not loaded or cannot be mixed.
        """
        self._check_name(name, replace, expected)
        with self._lock:
            parts = self._parts(mixture)
        read = self._read(name, parts[0].folder, parts)
        return self._serve(*read, replace=replace, expected=expected)

    def roll_back(
        self, name: str, to: str, *, folder: Path | None = None, expected: str | None = None
    ) -> AdapterInfo:
        """Serve an earlier version of a name again; see :meth:`load`.

        to: one of those of :meth:`versions`.
        folder: where its files are now; None if they are where they were.

        Raises AdapterError too, if its files have changed, and ParameterError if there is no such
        version.
        """
        self._check_name(name, True, expected)
        with self._lock:
            found = [each for each in self._earlier.get(name, ()) if each.digest.hex() == to]
        if not found:
            raise ParameterError("version", f"adapter {name!r} has had no version {to!r}")
        version, staged = self._read(name, folder or found[-1].folder, found[-1].parts)
        if version.digest != found[-1].digest:
            raise AdapterError(f"the files of version {to} of adapter {name!r} have changed since")
        return self._serve(version, staged, replace=True, expected=expected)

    def _serve(
        self,
        version: AdapterVersion,
        staged: StagedAdapter,
        *,
        replace: bool,
        expected: str | None,
    ) -> AdapterInfo:
        name = version.name
        if version.tokens is not None:
            self.prepare(version.tokens)
        with self._lock:
            self._check_name(name, replace, expected)
            before = self._versions.get(name)
            if before is not None:
                version.hits, version.last_used = before.hits, before.last_used
                version.tenants, version.pinned = before.tenants, before.pinned
                self._retire(before)
            self._versions[name] = version
            self.post(lambda: self.cache.offer(version, staged))
            if version.pinned:
                self.post(lambda: self.cache.pin(version, True))
        return AdapterInfo.of(version)

    def unload(self, name: str, *, expected: str | None = None) -> None:
        """Remove the name; requests that have begun finish.

        Raises ParameterError if it is unknown, and AdapterConflictError if it has another version
        than is expected.
        """
        with self._lock:
            version = self._find(name)
            self._check_name(name, True, expected)
            del self._versions[name]
            self._retire(version)

    def forget(self, name: str) -> None:
        """Forget the earlier versions of a name."""
        with self._lock:
            self._earlier.pop(name, None)

    def pin(self, name: str, pinned: bool, *, expected: str | None = None) -> AdapterInfo:
        """Have an adapter read now and stay in memory while others can make room, or no longer.

        Raises ParameterError if it is unknown, or if pinned adapters would take more than half of
        the memory, and AdapterConflictError if it has another version than is expected.
        """
        with self._lock:
            version = self._find(name)
            self._check_name(name, True, expected)
            others = (each for each in self._versions.values() if each is not version)
            taken = version.nbytes + sum(each.nbytes for each in others if each.pinned)
            if pinned and taken > self.host_bytes // 2:
                raise ParameterError(
                    "pinned",
                    f"pinned adapters would take {taken} bytes, more than half of the host memory "
                    f"for adapters ({self.host_bytes}): raise host_bytes, or unpin another",
                )
            version.pinned = pinned
            self.post(lambda: self.cache.pin(version, pinned))
            return AdapterInfo.of(version)

    def prefetch(self, name: str) -> AdapterInfo:
        """Have an adapter read into host memory before requests come for it, if there is room.

        Raises ParameterError if it is unknown.
        """
        with self._lock:
            version = self._find(name)
            self.post(lambda: self.cache.prefetch(version))
            return AdapterInfo.of(version)

    def versions(self, name: str) -> list[AdapterInfo]:
        """What the name stands for and has stood for since the start, the newest first.

        Of earlier versions the last few are known.
        """
        with self._lock:
            current = self._versions.get(name)
            found = [*self._earlier.get(name, ()), *([] if current is None else [current])]
            by_digest = {each.digest: each for each in found}
            newest = sorted(by_digest.values(), key=found.index, reverse=True)
            return [AdapterInfo.of(each) for each in newest]

    def version(self, name: str | None) -> AdapterVersion | None:
        """The version of this name; None if there is none, or for a mixture or the base model."""
        if name is None or isinstance(name, AdapterMixture):
            return None
        return self._versions.get(name)

    def info(self, name: str) -> AdapterInfo | None:
        """The adapter of this name; None if there is none."""
        version = self._versions.get(name)
        return None if version is None else AdapterInfo.of(version)

    def infos(self) -> list[AdapterInfo]:
        """Every loaded adapter, sorted by name."""
        with self._lock:
            return [AdapterInfo.of(self._versions[name]) for name in sorted(self._versions)]

    def usage(self) -> AdapterUsage:
        """Where the loaded adapters are, and which are in use."""
        in_slots, waiting, host = [], [], 0
        with self._lock:
            for name, version in self._versions.items():
                if version.slot is not None:
                    in_slots.append(name)
                elif version.in_host:
                    host += 1
                if version.waiting:
                    waiting.append(name)
            disk = len(self._versions) - len(in_slots) - host
        return AdapterUsage(
            slots=self.slots.count,
            device=len(in_slots),
            host=host,
            disk=disk,
            in_slots=tuple(in_slots),
            waiting=tuple(waiting),
        )

    def submit(self, name: str, send: Callable[[AdapterVersion], None], tenant: str = "") -> None:
        """Call ``send`` with the version of this name, or of a mixture.

        Raises ParameterError for an unknown name, or for adapters that cannot be mixed.

        The lock is held meanwhile: the version cannot be retired before the request is queued.
        """
        with self._lock:
            version = (
                self._mixed(name, tenant) if isinstance(name, AdapterMixture) else self._find(name)
            )
            send(version)
            _count(version, tenant)

    def _mixed(self, mixture: AdapterMixture, tenant: str) -> AdapterVersion:
        """The version of a mixture, which is kept while it is among those last asked for."""
        used = [self._find(name) for name, _ in mixture.parts]
        for version in used:
            _count(version, tenant)
        key: _MixtureKey = (mixture, *used)
        if key in self._mixtures:
            self._mixtures.move_to_end(key)
            return self._mixtures[key]
        parts = self._parts(mixture)
        rank, nbytes = (sum(getattr(each, of) for each in used) for of in ("rank", "nbytes"))
        try:
            self._check_room(mixture, rank, nbytes)
        except AdapterError as error:
            raise ParameterError("adapter", str(error)) from None
        version = AdapterVersion(
            mixture, parts[0].folder, _digest(parts), rank, nbytes, parts=parts
        )
        self._mixtures[key] = version
        if len(self._mixtures) > _MIXTURES:
            _, oldest = self._mixtures.popitem(last=False)
            self.post(lambda: self.cache.retire(oldest))
        return version

    def _parts(self, mixture: AdapterMixture) -> tuple[MixturePart, ...]:
        """The adapters of a mixture, mixtures among them taken apart."""
        parts: list[MixturePart] = []
        for name, weight in mixture.parts:
            version = self._find(name)
            if version.not_a_sum is not None:
                raise ParameterError(
                    "adapter",
                    f"adapter {name!r} {version.not_a_sum}: only plain LoRA can be mixed",
                )
            own = MixturePart(name, version.folder, version.weights_digest, 1.0)
            parts += [
                replace(each, weight=weight * each.weight) for each in version.parts or (own,)
            ]
        return tuple(parts)

    def _retire(self, version: AdapterVersion) -> None:
        """Take a version away from new requests, and the mixtures that have it."""
        earlier = self._earlier.setdefault(version.name, [])
        earlier[:] = [*earlier, version][-_EARLIER:]
        self._earlier.move_to_end(version.name)
        if len(self._earlier) > _EARLIER_NAMES:
            self._earlier.popitem(last=False)
        gone = [key for key in self._mixtures if version in key[1:]]
        for each in (version, *(self._mixtures.pop(key) for key in gone)):
            self.post(lambda each=each: self.cache.retire(each))  # type: ignore[misc]

    def successor(self, version: AdapterVersion) -> AdapterVersion | None:
        """The version now served under this version's name; None if it is the same or none."""
        with self._lock:
            found = self._versions.get(version.name)
        return None if found is version else found

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

    def restart(self) -> None:
        """Keep every name, but forget host copies and slots: the engine restarts from empty."""
        with self._lock:
            for version in (*self._versions.values(), *self._mixtures.values()):
                version.waiting = version.running = 0
                version.slot, version.in_host = None, False
            self.cache = self._empty_cache()
            for version in self._versions.values():
                if version.pinned:
                    self.cache.pin(version, True)

    def _empty_cache(self) -> AdapterCache:
        cache: AdapterCache
        cache = AdapterCache(self.slots, self.host_bytes, lambda v: self._load_later(v, cache))
        return cache

    def _check_name(self, name: str, replace: bool, expected: str | None) -> None:
        """Raises AdapterError if the name cannot be given to a version now."""
        if not name:
            raise AdapterError("an adapter needs a name")
        version = self._versions.get(name)
        if version is not None and not replace:
            raise AdapterError(f"adapter {name!r} is loaded already: replace it or unload it first")
        found = None if version is None else version.digest.hex()
        if expected is not None and expected != found:
            now = "not loaded" if found is None else f"version {found}"
            raise AdapterConflictError(
                f"adapter {name!r} is {now}, expected was version {expected}; nothing was changed"
            )

    def _find(self, name: str) -> AdapterVersion:
        version = self._versions.get(name)
        if version is None:
            names = sorted(self._versions)
            known = ", ".join(names[:_NAMES_IN_ERRORS]) or "none"
            if len(names) > _NAMES_IN_ERRORS:
                known += f" and {len(names) - _NAMES_IN_ERRORS} more"
            raise UnknownAdapterError("adapter", f"adapter {name!r} is not loaded; loaded: {known}")
        return version

    def _check_room(self, what: object, rank: int, nbytes: int) -> None:
        """Raises AdapterError for an adapter of a higher rank or more bytes than there is room."""
        require_rank(what, rank, self.slots.max_rank)
        if nbytes > self.host_bytes:
            raise AdapterError(
                f"{what} takes {nbytes} bytes, but the host memory for adapters is "
                f"{self.host_bytes}: raise host_bytes"
            )

    def _check_device_room(self, what: object, staged: StagedAdapter) -> None:
        """Raises AdapterError for an adapter that a GPU's memory for adapters could never hold."""
        needed, there = self.slots.bytes_for(staged), self.slots.device_bytes
        if needed > there:
            raise AdapterError(
                f"{what} takes {needed} bytes in a slot, but the GPU's memory for adapters is "
                f"{there}: raise device_bytes"
            )

    def _read(
        self, name: str, folder: Path, parts: tuple[MixturePart, ...] = ()
    ) -> tuple[AdapterVersion, StagedAdapter]:
        architecture = self.slots.architecture
        if parts:
            mixed = [load_adapter(part.folder, architecture) for part in parts]
            for part, found in zip(parts, mixed, strict=True):
                if found.digest != part.digest:
                    raise AdapterError(
                        f"{_changed(part.folder, part.name)}, and then its mixtures that have names"
                    )
            adapter = combine_adapters(mixed, [part.weight for part in parts])
        else:
            adapter = load_adapter(folder, architecture)
        self._check_room(folder, adapter.rank, 0)
        reads = self.own_settings and not parts
        tokens = self._own_tokens.of(folder if reads else None, adapter.vocab)
        own_tokens = None if tokens is self.tokens else tokens
        if adapter.vocab is not None and not tokens.added:
            logger.warning(
                "%s has rows for %d tokens, and no tokenizer that is used with more than the base "
                "model's %d: the others are never sampled",
                folder,
                adapter.vocab,
                tokens.known,
            )
        staged = self.slots.stage(adapter, None if own_tokens is None else own_tokens.known)
        self._check_room(folder, 0, staged.nbytes)
        self._check_device_room(folder, staged)
        if not self.slots.is_finite(staged):
            raise AdapterError(
                f"{folder} has values that, times alpha / r, {self.slots.dtype} cannot hold"
            )
        version = AdapterVersion(
            name,
            folder,
            adapter.digest,
            adapter.rank,
            staged.nbytes,
            weights_digest=adapter.digest,
            parts=parts,
            not_a_sum=not_a_sum(adapter) or (None if own_tokens is None else "has own tokens"),
            invocation=adapter.invocation,
            tokens=own_tokens,
        )
        if own_tokens is not None:
            content = own_tokens.key.encode()
            version.digest = blake2b(version.digest + content, digest_size=16).digest()
        if reads:
            self._read_settings(version)
        return version, staged

    def _read_settings(self, version: AdapterVersion) -> None:
        own = read_own_settings(version.folder)
        version.template = own.template
        if own != OwnSettings():
            content = json.dumps([own.template, own.generation], default=dict).encode()
            version.digest = blake2b(version.digest + content, digest_size=16).digest()
        if own.generation is not None:
            try:
                version.sampling = sampling_defaults(own.generation)
                tokens = version.tokens or self.tokens
                version.end_tokens = own_end_tokens(own.generation, tokens.rows)
            except ValueError as error:
                raise AdapterError(f"{version.folder}: {error}") from error

    def _load_later(self, version: AdapterVersion, cache: AdapterCache) -> None:
        def answer(function: Callable[[], None]) -> None:
            # After an engine restart there is a new cache, which did not ask for this read.
            self.post(lambda: function() if cache is self.cache else None)

        def read() -> None:
            try:
                again, staged = self._read(version.name, version.folder, version.parts)
                if again.digest != version.digest:
                    raise AdapterError(_changed(version.folder, version.name))
            except Exception as error:  # of any kind, or requests would wait for ever
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


def require_rank(what: object, rank: int, max_rank: int) -> None:
    """Raises AdapterError for an adapter of a higher rank than the slots hold."""
    if rank > max_rank:
        raise AdapterError(
            f"{what} has rank {rank}, but this server holds adapters up to rank {max_rank}: raise "
            "max_rank"
        )


def _changed(folder: Path, name: str) -> str:
    return f"{folder} has changed since adapter {name!r} was loaded from it: load it again"


def _digest(parts: tuple[MixturePart, ...]) -> bytes:
    return combined_digest([part.digest for part in parts], [part.weight for part in parts])


def _count(version: AdapterVersion, tenant: str) -> None:
    """Count a request."""
    version.hits += 1
    version.last_used = int(time.time())
    if tenant and len(version.tenants) < _TENANTS:
        version.tenants.add(tenant)
