"""A folder of fetched adapters, which holds at most so many bytes: the least recently used go."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_PARTIAL = ".partial-"


class CacheFullError(RuntimeError):
    """An adapter does not fit: what the cache holds is in use, or it is larger than the cache."""


class AdapterDiskCache:
    """Safe from any thread. A folder belongs to one server at a time.

    may_remove: asked before an entry goes; whoever uses the entry gives it up or says no.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """limit: bytes. Raises ValueError if another server has the folder, OSError if it cannot
        be written."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._limit = limit
        self._lock = threading.Lock()
        self._owner = FileLock(folder / ".lock")
        try:
            self._owner.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another server has the folder {folder}: each needs a --lora-cache-dir of its own"
            ) from None
        self.may_remove: Callable[[str], bool] = lambda key: True
        # Bytes by key, the least recently used first.
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._reserved = 0
        self._evictions = 0
        found = [path for path in folder.iterdir() if path.is_dir()]
        for path in sorted(found, key=lambda path: path.stat().st_mtime):
            if path.name.startswith(_PARTIAL):
                shutil.rmtree(path, ignore_errors=True)
            else:
                self._sizes[path.name] = _size(path)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(self._sizes.values()) + self._reserved

    def get(self, key: str) -> Path | None:
        """An entry's folder, which counts as used now; None if there is none."""
        with self._lock:
            if key not in self._sizes:
                return None
            self._sizes.move_to_end(key)
            return self._folder / key

    def add(self, key: str, nbytes: int, fill: Callable[[Path], None]) -> Path:
        """Make an entry of about so many bytes, or find it.

        fill: writes the files into a folder; what it raises leaves nothing behind. The entry then
            counts as many bytes as they have.

        Raises CacheFullError.
        """
        if (known := self.get(key)) is not None:
            return known
        self._reserve(nbytes)
        try:
            with self.scratch() as partial:
                fill(partial)
                written = _size(partial)
                with self._lock:
                    if key not in self._sizes:
                        partial.rename(self._folder / key)
                        self._sizes[key] = written
                    self._sizes.move_to_end(key)
            return self._folder / key
        finally:
            with self._lock:
                self._reserved -= nbytes

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder that is no entry, and is removed afterwards; of a killed server at the next
        start."""
        folder = self._folder / f"{_PARTIAL}{uuid4().hex}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def take_evictions(self) -> int:
        """How many entries were removed for others since the last call."""
        with self._lock:
            count, self._evictions = self._evictions, 0
        return count

    def close(self) -> None:
        self._owner.release()

    def _reserve(self, nbytes: int) -> None:
        """Make room. ``may_remove`` is called without the lock."""
        if nbytes > self._limit:
            raise CacheFullError(
                f"the adapter has {nbytes} bytes, but --lora-cache-size is {self._limit}"
            )
        with self._lock:
            oldest = list(self._sizes)
        for key in [*oldest, None]:
            with self._lock:
                if sum(self._sizes.values()) + self._reserved + nbytes <= self._limit:
                    self._reserved += nbytes
                    return
            if key is not None and self.may_remove(key):
                self._remove(key)
        raise CacheFullError(
            f"all adapters on disk are in use, and --lora-cache-size is {self._limit}"
        )

    def _remove(self, key: str) -> None:
        with self._lock:
            if self._sizes.pop(key, None) is None:
                return
            self._evictions += 1
            shutil.rmtree(self._folder / key, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
