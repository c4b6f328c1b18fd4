"""A file of the adapters loaded through the API, from which a restart loads them again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from nybble.loaders.cache import cache_folder

logger = logging.getLogger(__name__)

Source = str | dict[str, float]


def default_path(model: str, place: int | Path, roots: Iterable[Path]) -> Path:
    """A file in the cache folder, different for each model, port or socket, and set of roots."""
    parts = (
        model,
        place if isinstance(place, int) else str(place.resolve()),
        sorted(str(root.resolve()) for root in roots),
    )
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return cache_folder() / "state" / f"adapters-{digest}.json"


class AdapterState:
    """Adapter paths by name, or the weights of adapters in a mixture, also by name.

    Thread-safe; every change is written atomically before it returns.

    A file that cannot be read is put aside, and a failure to write is logged. Neither keeps the
    server from serving.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._paths = self._read()

    def paths(self) -> dict[str, Source]:
        """The adapters that a start loads again."""
        with self._lock:
            return dict(self._paths)

    def keep(self, name: str, path: Source) -> None:
        """Record an adapter that was loaded or replaced."""
        self._change(lambda paths: paths.__setitem__(name, path))

    def forget(self, name: str) -> None:
        """Remove an adapter that was unloaded, if it is recorded."""
        self._change(lambda paths: paths.pop(name, None))

    def _change(self, change: Callable[[dict[str, Source]], object]) -> None:
        with self._lock:
            before = dict(self._paths)
            change(self._paths)
            if self._paths == before:
                return
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("w") as file:
                    json.dump({"adapters": self._paths}, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self._path)
            except OSError as error:
                partial.unlink(missing_ok=True)
                logger.error("the next start will not know this change of adapters: %s", error)

    def _read(self) -> dict[str, Source]:
        try:
            paths = json.loads(self._path.read_text())["adapters"]
            if all(isinstance(path, str) or _is_mixture(path) for path in paths.values()):
                return dict(paths)
            raise ValueError("a path is not a string")
        except FileNotFoundError:
            return {}
        except OSError as error:
            logger.error("adapters of earlier are not loaded: %s", error)
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            aside = self._path.with_name(self._path.name + ".broken")
            logger.error("%s is not a list of adapters, put aside: %r", self._path, error)
            self._path.replace(aside)
            return {}


def _is_mixture(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(weight, int | float) for weight in value.values()
    )
