"""The SQLite database of files, jobs, events and batches."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 10.0
_VERSION = 2
# `number` orders rows created within the same second, and is the cursor of pages.
_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    created INTEGER NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, examples INTEGER NOT NULL, chats INTEGER NOT NULL
);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    created INTEGER NOT NULL, status TEXT NOT NULL, request TEXT NOT NULL, plan TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, started INTEGER, finished INTEGER,
    step INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0, tokens INTEGER,
    model TEXT, result_file TEXT, best TEXT, error TEXT
);
CREATE INDEX jobs_by_status ON jobs (status);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL,
    job TEXT NOT NULL REFERENCES jobs (id), created INTEGER NOT NULL, level TEXT NOT NULL,
    type TEXT NOT NULL, message TEXT NOT NULL, data TEXT
);
CREATE INDEX events_by_job ON events (job, number);
"""
# What format 2 has and format 1 had not. `request`: the body that created the batch. `times`: when
# each status began, by its name. `stuck`: starts of a server since a line was finished.
_BATCHES = """
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    created INTEGER NOT NULL, expires INTEGER NOT NULL, status TEXT NOT NULL,
    request TEXT NOT NULL, model TEXT, errors TEXT, times TEXT NOT NULL,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, output_file TEXT, error_file TEXT,
    stuck INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX batches_by_status ON batches (status);
"""


class Database:
    """One connection for all threads; each use is a transaction of its own."""

    def __init__(self, state: Path) -> None:
        """Open or create ``state.db`` in the folder, which is locked while the object lives.

        Raises OSError if another server uses the folder, and ValueError for a newer format.
        """
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_file = FileLock(state / "lock")
        try:
            self._lock_file.acquire(timeout=0)
        except Timeout:
            raise OSError(
                f"{state} is in use by another server: give another --state-dir"
            ) from None
        self._mutex = threading.Lock()
        self._connection = sqlite3.connect(
            state / "state.db", isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        # A write-ahead log: readers see whole transactions, and a killed process loses none.
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise ValueError(f"{state}/state.db has format {version}, this server knows {_VERSION}")
        if version < _VERSION:
            lacking = (_SCHEMA if version == 0 else "") + _BATCHES
            self._connection.executescript(
                f"BEGIN; {lacking} PRAGMA user_version = {_VERSION}; COMMIT;"
            )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed at the end, rolled back if the block raises."""
        with self._mutex:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._mutex:
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        with self._mutex:
            self._connection.close()
        self._lock_file.release()


async def until_recorded(change: Callable[..., T], *arguments: Any) -> T:
    """Call a function that writes to the folder; retry while that cannot be done."""
    while True:
        try:
            return await asyncio.to_thread(change, *arguments)
        except (sqlite3.Error, OSError) as error:  # most likely the disk is full
            logger.error("batches and fine-tuning jobs wait %g s: %s", RETRY_SECONDS, error)
            await asyncio.sleep(RETRY_SECONDS)
