"""Watches a folder of adapters: new ones are loaded, removed ones unloaded."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from nybble.engine import AdapterError, Engine, ParameterError
from nybble.server.adapters.names import require_name
from nybble.server.lifecycle.flag_names import in_flags

logger = logging.getLogger(__name__)

_CONFIG = "adapter_config.json"

# Of an adapter's files: name, size and time of change.
Signature = tuple[tuple[str, int, int], ...]


class AdapterWatch:
    """Each subfolder with an adapter is loaded under the subfolder's name.

    A folder is read once it has not changed for an interval, so that none is read half-written.
    The base model's names, and adapters that were loaded in other ways, are left alone.
    """

    def __init__(self, engine: Engine, folder: Path, models: tuple[str, ...]) -> None:
        self._engine = engine
        self._folder = folder
        self._taken = set(models)
        self._seen: dict[str, Signature] = {}
        self._loaded: dict[str, Signature] = {}
        self._failed: dict[str, Signature] = {}

    async def run(self, interval: float = 1.0) -> None:
        """Follow the folder until cancelled."""
        while True:
            await asyncio.to_thread(self.scan)
            await asyncio.sleep(interval)

    def scan(self) -> None:
        """Load, replace and unload what changed and has been stable since the last scan."""
        found = self._signatures()
        for name in [name for name in self._loaded if name not in found]:
            del self._loaded[name]
            try:
                self._engine.unload_adapter(name)
                logger.info("adapter %s was removed: unloaded", name)
            except ParameterError:
                pass  # unloaded by hand already
        for name, signature in found.items():
            settled = self._seen.get(name) == signature
            known = (self._loaded.get(name), self._failed.get(name))
            if settled and signature not in known:
                self._load(name, signature)
        self._seen = found

    def _load(self, name: str, signature: Signature) -> None:
        if name in self._taken:
            self._fail(name, signature, "the base model has that name")
            return
        try:
            require_name(name)
            replace = name in self._loaded
            self._engine.load_adapter(name, str(self._folder / name), replace=replace)
        except (AdapterError, ValueError, OSError) as error:
            self._fail(name, signature, in_flags(error))
        except Exception as error:  # one bad folder must not end the watch
            logger.exception("loading adapter %s failed", name)
            self._fail(name, signature, repr(error))
        else:
            self._loaded[name] = signature
            logger.info("adapter %s was %s", name, "replaced" if replace else "loaded")

    def _fail(self, name: str, signature: Signature, reason: str) -> None:
        self._failed[name] = signature  # logged once; tried again when its files change
        logger.error("adapter %s cannot be loaded: %s", name, reason)

    def _signatures(self) -> dict[str, Signature]:
        found: dict[str, Signature] = {}
        try:
            folders = [path for path in self._folder.iterdir() if (path / _CONFIG).is_file()]
            for folder in sorted(folders):
                files = [file for file in sorted(folder.iterdir()) if file.is_file()]
                stats = [(file.name, file.stat()) for file in files]
                found[folder.name] = tuple((n, s.st_size, s.st_mtime_ns) for n, s in stats)
        except OSError as error:  # removed during the scan
            logger.warning("%s: %s", self._folder, error)
            return self._seen
        return found
