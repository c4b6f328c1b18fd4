"""Stored responses: an SQLite file, in which each owner has so much room."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic_core import from_json, to_json

logger = logging.getLogger(__name__)

_VERSION = 1
# `number` is the order in which rows were written: the oldest give way.
_SCHEMA = """
CREATE TABLE responses (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    bytes INTEGER NOT NULL, unfinished INTEGER NOT NULL, response BLOB NOT NULL, items BLOB NOT NULL
);
CREATE INDEX responses_by_owner ON responses (owner, number);
"""
_INTERRUPTED = "the server ended before the response did"


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the conversation that it ends.

    owner: whose it is; "" without tenants.
    response: as it was sent.
    items: all input items of the conversation, without the response's own output.
    """

    owner: str
    response: dict[str, Any]
    items: list[dict[str, Any]]

    @property
    def id(self) -> str:
        return str(self.response["id"])

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The input items with which the next response begins."""
        return [*self.items, *self.response["output"]]


class ResponseStore:
    """Reads and writes on a thread of its own. What is being written can be read already.

    What cannot be written, as where the disk is full, stays in memory and is written once there is
    room; :meth:`ready` takes nothing new until then.
    """

    def __init__(self, path: Path, bytes_per_owner: int) -> None:
        """Open or create the file. Responses that were not finished when the last server ended have
        failed.

        Raises OSError if the file cannot be opened, and ValueError for a newer format.
        """
        self._most = bytes_per_owner
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nybble-responses")
        self._pending: dict[str, StoredResponse] = {}
        self._failing = False  # the last write has failed
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What is unfinished here would be another server's.
        self._lock = FileLock(f"{path}.lock", thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OSError(
                f"{path} is in use by another server: give another --response-store"
            ) from None
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            path.chmod(0o600)  # it has what users wrote
            # A write-ahead log: a killed process loses no whole transaction.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise ValueError(f"{path} has format {version}, this server knows {_VERSION}")
            if version == 0:
                self._connection.executescript(
                    f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;"
                )
            self._fail_unfinished()
        except sqlite3.Error as error:
            self._lock.release()
            raise OSError(f"{path} cannot be used: {error}") from None

    def close(self) -> None:
        """Write what is still to be written, and close the file."""
        self._pool.shutdown(wait=True)
        if self._failing:
            try:
                self._write_pending()
            except sqlite3.Error as error:
                logger.error("%d responses are lost: %s", len(self._pending), error)
        self._connection.close()
        self._lock.release()

    async def ready(self) -> None:
        """Raises sqlite3.Error while responses cannot be written: before one is begun."""
        if self._failing:
            await asyncio.get_running_loop().run_in_executor(self._pool, self._write_pending)

    def save(self, stored: StoredResponse) -> None:
        """Write a response, in place of an earlier state of it. The oldest of its owner's give way;
        one that is larger than the owner's room is not kept."""
        self._pending[stored.id] = stored
        self._pool.submit(self._try_to_write, stored)

    async def get(self, id: str, owner: str) -> StoredResponse | None:
        """An owner's response; None if there is none of this id."""
        pending = self._pending.get(id)
        if pending is not None:
            return pending if pending.owner == owner else None
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._read, id, owner)

    async def delete(self, id: str, owner: str) -> bool:
        """Whether there was such a response, which is gone now."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._drop, id, owner)

    def _try_to_write(self, stored: StoredResponse) -> None:
        try:
            self._write(stored)
        except sqlite3.Error as error:
            if not self._failing:
                logger.error("responses cannot be stored: %s", error)
            self._failing = True
        except Exception:  # of this response alone: nobody else would say so
            logger.exception("response %s cannot be stored", stored.id)
            self._pending.pop(stored.id, None)

    def _write_pending(self) -> None:
        for stored in list(self._pending.values()):
            self._write(stored)
        if self._failing:
            logger.info("responses can be stored again")
        self._failing = False

    def _write(self, stored: StoredResponse) -> None:
        response, items = (zlib.compress(to_json(each)) for each in (stored.response, stored.items))
        unfinished = stored.response["status"] in ("queued", "in_progress")
        size = len(response) + len(items)
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            execute("DELETE FROM responses WHERE id = ?", (stored.id,))
            if size <= self._most:
                execute(
                    "INSERT INTO responses (id, owner, bytes, unfinished, response, items) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (stored.id, stored.owner, size, unfinished, response, items),
                )
            # All but the newest whose sizes add up to the owner's room.
            execute(
                "DELETE FROM responses WHERE number IN (SELECT number FROM (SELECT number, "
                "SUM(bytes) OVER (ORDER BY number DESC) AS total FROM responses "
                "WHERE owner = ?) WHERE total > ?)",
                (stored.owner, self._most),
            )
            execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk may have ended it
                execute("ROLLBACK")
            raise
        if self._pending.get(stored.id) is stored:
            del self._pending[stored.id]

    def _read(self, id: str, owner: str) -> StoredResponse | None:
        row = self._connection.execute(
            "SELECT response, items FROM responses WHERE id = ? AND owner = ?", (id, owner)
        ).fetchone()
        if row is None:
            return None
        response, items = (from_json(zlib.decompress(each)) for each in row)
        return StoredResponse(owner, response, items)

    def _drop(self, id: str, owner: str) -> bool:
        pending = self._pending.get(id)  # what could not be written
        unwritten = pending is not None and pending.owner == owner
        if unwritten:
            del self._pending[id]
        found = self._connection.execute(
            "DELETE FROM responses WHERE id = ? AND owner = ?", (id, owner)
        )
        return unwritten or found.rowcount > 0

    def _fail_unfinished(self) -> None:
        rows = self._connection.execute(
            "SELECT number, response FROM responses WHERE unfinished"
        ).fetchall()
        for number, packed in rows:
            response = from_json(zlib.decompress(packed))
            response |= failed(_INTERRUPTED)
            self._connection.execute(
                "UPDATE responses SET response = ?, unfinished = 0 WHERE number = ?",
                (zlib.compress(to_json(response)), number),
            )


def failed(message: str) -> dict[str, Any]:
    """The fields of a response that has failed."""
    return {"status": "failed", "error": {"code": "server_error", "message": message}}
