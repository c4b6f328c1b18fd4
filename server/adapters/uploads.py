"""Uploaded adapters on disk: ``FOLDER/NAME/VERSION/``, the greatest version being the current one.

A slash in a name is ``%2F`` in that of its folder.

A version appears complete, by renaming, or not at all. A replaced or deleted version is first
marked and removed later, because requests that have begun may still have to read it. An unloaded
version is marked and kept: no start loads it until it is loaded by its path or replaced.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote
from uuid import uuid4

from nybble.server.adapters.names import is_name

logger = logging.getLogger(__name__)

_RETIRED = ".retired"
_UNLOADED = ".unloaded"
_PARTIAL = ".partial-"
_KEEP_SECONDS = 600


class AdapterUploads:
    """Safe from any thread; one server per folder."""

    def __init__(self, folder: Path) -> None:
        """The folder is made with the first upload."""
        self._folder = folder
        self._lock = threading.Lock()

    def recover(self) -> dict[str, Path]:
        """Current versions by name, except unloaded ones. Removes unfinished and retired ones."""
        if not self._folder.is_dir():
            return {}
        with self._lock:
            for left in self._folder.glob(_PARTIAL + "*"):
                shutil.rmtree(left, ignore_errors=True)
            self._remove_retired(older_than=0)
            names = sorted(n for p in self._folder.iterdir() if is_name(n := unquote(p.name)))
            current = {name: found[-1] for name in names if (found := self._versions(name))}
            return {n: path for n, path in current.items() if not (path / _UNLOADED).exists()}

    def holds(self, folder: Path) -> bool:
        """Whether a folder, after following links, is an uploaded version."""
        return folder.is_relative_to(self._folder)

    def is_current(self, name: str, folder: Path) -> bool:
        """Whether a folder is the current version of ``name``, unloaded or not."""
        with self._lock:
            return self._versions(name)[-1:] == [folder]

    def has(self, name: str) -> bool:
        """Whether there is a version of ``name``, loaded or not."""
        with self._lock:
            return bool(self._versions(name))

    def set_unloaded(self, name: str, unloaded: bool) -> None:
        """Set whether a start skips ``name``. Does nothing if it was not uploaded."""
        with self._lock:
            for version in self._versions(name)[-1:]:
                mark = version / _UNLOADED
                mark.touch() if unloaded else mark.unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder to receive files in. Removed afterwards unless :meth:`publish` took it."""
        folder = self._folder / f"{_PARTIAL}{uuid4().hex}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, name: str, scratch: Path) -> Path:
        """Make the files in ``scratch`` a version of ``name``; returns its folder."""
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        with self._lock:
            versions = self._named(name)
            versions.mkdir(exist_ok=True)
            version = versions / f"{time.time_ns():020}"
            scratch.rename(version)
            return version

    def discard(self, version: Path) -> None:
        """Remove a version that was never used."""
        with self._lock:
            shutil.rmtree(version, ignore_errors=True)
            self._remove_if_empty(version.parent)

    def retire(self, name: str, *, but: Path | None = None, keep: int = 0) -> None:
        """Mark all versions of ``name``, or those before ``but``. Later calls remove them.

        keep: how many of those before ``but`` are left, the newest ones.
        """
        with self._lock:
            versions = self._versions(name)
            if but is not None:
                before = [version for version in versions if version.name < but.name]
                versions = before[: len(before) - keep] if keep < len(before) else []
            for version in versions:
                (version / _RETIRED).touch()
            self._remove_retired(older_than=_KEEP_SECONDS)

    def _versions(self, name: str) -> list[Path]:
        if not is_name(name):
            return []
        folder = self._named(name)
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(version for version in found if not (version / _RETIRED).exists())

    def _named(self, name: str) -> Path:
        return self._folder / quote(name, safe=":")

    def _remove_retired(self, older_than: float) -> None:
        for mark in list(self._folder.glob(f"*/*/{_RETIRED}")):
            if time.time() - mark.stat().st_mtime >= older_than:
                shutil.rmtree(mark.parent, ignore_errors=True)
                self._remove_if_empty(mark.parent.parent)

    def _remove_if_empty(self, folder: Path) -> None:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
