"""The cache of packed models: one folder for each model, recipe and layout.

A folder's name ends in a digest of what it was made from: the source's path, the size and time of
its files, the recipe, the layout and the packed form's version. ``origin.json`` in it
records the same in readable form. It tells which entries are stale: their source has changed, is
gone, or is a hub snapshot that a newer one has replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nybble.loaders.cache import cache_folder, make_folder
from nybble.loaders.errors import CheckpointError
from nybble.loaders.model_files import settings_files, side_files
from nybble.loaders.packed_file import VERSION, PackedCheckpoint

logger = logging.getLogger(__name__)

_ORIGIN = "origin.json"
_SCRATCH = (".partial", ".gptq", ".merged")


@dataclass(frozen=True)
class Origin:
    """What a packed model was made from.

    source: the model's folder, links resolved.
    layout: of the codes, see :data:`nybble.kernels.layout.Layout`.
    recipe: how it was rounded, and which adapter was merged.
    """

    source: Path
    layout: str
    recipe: str

    def place(self) -> Path:
        """The folder of its packed form. Raises OSError if the source is gone."""
        files = [
            *side_files(self.source),
            *settings_files(self.source),
            *sorted(
                file.relative_to(self.source)
                for kind in ("*.safetensors", "*.gguf")
                for file in self.source.glob(kind)
            ),
        ]
        status = [(self.source / file).stat() for file in files]
        stats = [
            (str(file), of_file.st_size, of_file.st_mtime_ns)
            for file, of_file in zip(files, status, strict=True)
        ]
        parts = (str(self.source), stats, self.layout, self.recipe, VERSION)
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return packed_folder() / f"{self.source.name}-{digest}"

    def identity(self) -> tuple[Path, str, str]:
        """A key that is equal for all snapshots of the same hub model."""
        hub = _hub_model(self.source)
        return hub or self.source, self.layout, self.recipe


@dataclass(frozen=True)
class Entry:
    """A folder of the cache.

    nbytes: its size on disk.
    origin: None if origin.json cannot be read.
    stale: why no server will use it again; None if one may.
    """

    path: Path
    nbytes: int
    origin: Origin | None
    stale: str | None


def packed_folder() -> Path:
    return cache_folder() / "packed"


@contextmanager
def reserved(origin: Origin) -> Iterator[tuple[Path, bool]]:
    """Lock an entry: yields its folder, and whether it is missing and has to be packed."""
    packed = origin.place()
    make_folder(packed.parent)
    with FileLock(_lock(packed)):
        if packed.is_dir():
            try:
                PackedCheckpoint(packed).check()
            except (CheckpointError, OSError, ValueError) as error:
                logger.warning("%s is damaged and is packed again: %s", packed, error)
                shutil.rmtree(packed)
        yield packed, not packed.is_dir()


def keep(packed: Path, origin: Origin) -> None:
    """Write origin.json, and remove older entries of the same model.

    Also removes unfinished folders of killed processes. A server that has an old entry mapped can
    use it until it ends.
    """
    written = {"source": str(origin.source), "layout": origin.layout, "recipe": origin.recipe}
    (packed / _ORIGIN).write_text(json.dumps(written))
    for entry in entries():
        same = entry.origin is not None and entry.origin.identity() == origin.identity()
        if entry.stale and (same or entry.path.suffix in _SCRATCH):
            logger.info("removing %s from the cache: %s", entry.path.name, entry.stale)
            remove(entry)


def entries() -> list[Entry]:
    """The cache's entries by name, without those being written now."""
    folder = packed_folder()
    if not folder.is_dir():
        return []
    found = (_entry(path) for path in sorted(folder.iterdir()) if path.is_dir())
    return [entry for entry in found if entry is not None]


def remove(entry: Entry) -> None:
    """Remove an entry and its lock's file."""
    shutil.rmtree(entry.path, ignore_errors=True)
    _lock(entry.path).unlink(missing_ok=True)


def _entry(path: Path) -> Entry | None:
    if path.suffix in _SCRATCH:
        return None if _locked(path.with_suffix(".lock")) else _made(path, None, "left half done")
    origin = _origin(path)
    if origin is None:
        # A process that holds the lock has packed it and not yet written origin.json.
        return None if _locked(_lock(path)) else _made(path, None, "it does not say what it is of")
    return _made(path, origin, _why_stale(path, origin))


def _made(path: Path, origin: Origin | None, stale: str | None) -> Entry:
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Entry(path, nbytes, origin, stale)


def _why_stale(path: Path, origin: Origin) -> str | None:
    try:
        place = origin.place()
    except OSError:
        place = None
    if place is None or not (origin.source / "config.json").is_file():
        return "its model has gone"
    hub = _hub_model(origin.source)
    if hub is not None and _current_snapshot(hub) not in (None, origin.source.name):
        return "the hub's cache has a newer snapshot"
    # Compare digests only: an alias may have given the entry another name before the digest.
    if place.name.rpartition("-")[2] != path.name.rpartition("-")[2]:
        return "its model or the packed form has changed"
    return None


def _origin(path: Path) -> Origin | None:
    try:
        written: Any = json.loads((path / _ORIGIN).read_text())
        return Origin(Path(written["source"]), str(written["layout"]), str(written["recipe"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hub_model(source: Path) -> Path | None:
    """The model's folder in the hub's cache, ``models--org--name``, if ``source`` is a snapshot."""
    is_snapshot = source.parent.name == "snapshots"
    model = source.parent.parent
    return model if is_snapshot and model.name.startswith("models--") else None


def _current_snapshot(model: Path) -> str | None:
    try:
        return (model / "refs" / "main").read_text().strip()
    except OSError:
        return None


def _lock(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _locked(lock: Path) -> bool:
    """Whether a process holds the lock."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True
