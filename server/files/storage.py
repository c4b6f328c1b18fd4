"""The folder in which a server keeps what clients upload and what is made of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nybble.server.files.database import Database
from nybble.server.files.files import Check, Files


def default_state() -> Path:
    """As the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "nybble"


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """Where files and what belongs to them are kept, and their limits.

    state: the folder; only one server at a time may use it.
    max_file_bytes: limit for one uploaded file.
    quota_bytes: limit for all files of one owner together.
    """

    state: Path
    max_file_bytes: int = 512 << 20
    quota_bytes: int = 4 << 30


class Storage:
    """The files, and the database of all that is kept."""

    def __init__(self, settings: StorageSettings, checks: Mapping[str, Check]) -> None:
        """checks: of uploaded files, by their purpose.

        Raises OSError or ValueError if the folder cannot be used.
        """
        self.folder = settings.state
        self.database = Database(settings.state)
        self.files = Files(
            settings.state / "files",
            self.database,
            max_file_bytes=settings.max_file_bytes,
            quota_bytes=settings.quota_bytes,
            checks=checks,
        )

    async def lifespan(self, _: web.Application) -> AsyncIterator[None]:
        yield
        self.database.close()


class FilesCollector(Collector):
    """The metrics of files."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def collect(self) -> Iterator[Metric]:
        count, size = self._files.totals()
        yield GaugeMetricFamily("nybble_files", "Files stored.", value=count)
        yield GaugeMetricFamily("nybble_file_bytes", "Bytes of the files stored.", value=size)
