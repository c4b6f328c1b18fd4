"""Uploaded files: their bytes are in a folder, their metadata in the database."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection, Row
from typing import Any, BinaryIO, TypeVar

from nybble.server.files.database import Database
from nybble.server.files.paging import Page
from nybble.server.http.errors import ApiError

GrowingT = TypeVar("GrowingT", bound="Growing")

_PARTIAL = ".partial"


@dataclass(frozen=True)
class StoredFile:
    """A file's metadata.

    examples: lines of training data; 0 for results.
    chats: lines with messages; 0 for results.
    """

    number: int
    id: str
    owner: str
    created: int
    filename: str
    purpose: str
    bytes: int
    examples: int
    chats: int

    @classmethod
    def of(cls, row: Row) -> StoredFile:
        return cls(**dict(row))

    def body(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
            "expires_at": None,
        }


# Looks at a file that was uploaded: its lines of training data, and those of them with messages.
# Raises ApiError 400 naming the first bad line.
Check = Callable[[Path], tuple[int, int]]


@dataclass(eq=False)
class Growing:
    """What is being written for an owner, and counts against the owner's quota."""

    owner: str
    bytes: int = 0


class Upload(Growing):
    """A file being uploaded."""

    def __init__(self, files: Files, owner: str, path: Path, file: BinaryIO) -> None:
        super().__init__(owner)
        self._files, self.path, self._file = files, path, file

    def write(self, chunk: bytes) -> None:
        """Raises ApiError 413 beyond a limit, and OSError if the disk is full."""
        self.bytes += len(chunk)
        self._files.require_room(self.owner, self.bytes)
        self._file.write(chunk)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


class Files:
    """Files by id. Every listed file is complete; an interrupted upload is removed."""

    def __init__(
        self,
        folder: Path,
        database: Database,
        *,
        max_file_bytes: int,
        quota_bytes: int,
        checks: Mapping[str, Check],
    ) -> None:
        """checks: by the purpose of files that may be uploaded."""
        self._folder = folder
        self._database = database
        self._max_file_bytes = max_file_bytes
        self._quota_bytes = quota_bytes
        self._growing: list[Growing] = []
        self._checks = checks
        folder.mkdir(parents=True, exist_ok=True)
        known = {row["id"] for row in database.rows("SELECT id FROM files")}
        for path in folder.iterdir():
            if path.name not in known:
                path.unlink()  # left by a killed server: never listed

    @contextmanager
    def upload(self, owner: str) -> Iterator[Upload]:
        """A file to write to. It is removed at the end unless :meth:`add` took it."""
        path = self._folder / (secrets.token_hex(12) + _PARTIAL)
        with path.open("wb") as file:
            try:
                with self.growing(Upload(self, owner, path, file)) as upload:
                    yield upload
            finally:
                path.unlink(missing_ok=True)

    @contextmanager
    def growing(self, what: GrowingT) -> Iterator[GrowingT]:
        """Count ``what`` against its owner's quota meanwhile."""
        self._growing.append(what)
        try:
            yield what
        finally:
            self._growing.remove(what)

    def require_room(self, owner: str, size: int) -> None:
        """Raises ApiError 413 if an upload of ``size`` bytes exceeds a limit."""
        if size > self._max_file_bytes:
            raise ApiError(
                413,
                f"the file is larger than this server's limit of {self._max_file_bytes} bytes",
                param="file",
                code="file_too_large",
            )
        if self.room(owner) < 0:
            raise ApiError(
                413,
                f"your files together would be larger than the limit of {self._quota_bytes} bytes: "
                "delete some",
                param="file",
                code="storage_limit_exceeded",
            )

    def room(self, owner: str) -> int:
        """Bytes that the owner may still store; negative if what is being written is too much."""
        growing = sum(each.bytes for each in self._growing if each.owner == owner)
        return self._quota_bytes - self.bytes_of(owner) - growing

    def add(self, upload: Upload, *, filename: str, purpose: str, owner: str) -> StoredFile:
        """Check the file as its purpose wants it, and list it.

        Raises ApiError 400 naming the first bad line.
        """
        upload.finish()
        counts = self._checks[purpose](upload.path)
        return self._list(upload.path, upload.bytes, filename, purpose, owner, *counts)

    @property
    def purposes(self) -> Collection[str]:
        """Those of files that may be uploaded."""
        return self._checks.keys()

    def add_result(self, content: bytes, *, filename: str, owner: str) -> StoredFile:
        """Add a file that the server made, without checking the quota."""
        path = self._folder / (secrets.token_hex(12) + _PARTIAL)
        try:
            path.write_bytes(content)
            return self.take(path, filename=filename, purpose="fine-tune-results", owner=owner)
        finally:
            path.unlink(missing_ok=True)

    def take(
        self,
        path: Path,
        *,
        filename: str,
        purpose: str,
        owner: str,
        note: Callable[[Connection, str], None] = lambda *_: None,
    ) -> StoredFile:
        """Add a file that the server wrote. Its bytes stay at ``path`` until it is listed.

        note: records the file's id, in the transaction that lists it.
        """
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return self._list(path, path.stat().st_size, filename, purpose, owner, 0, 0, note=note)

    def _list(
        self,
        path: Path,
        size: int,
        name: str,
        purpose: str,
        owner: str,
        *n: int,
        note: Callable[[Connection, str], None] = lambda *_: None,
    ) -> StoredFile:
        id = "file-" + secrets.token_hex(12)
        # A link first, listed second: if the server is killed in between, a start removes the link.
        os.link(path, self.path(id))
        try:
            with self._database.transaction() as connection:
                connection.execute(
                    "INSERT INTO files (id, owner, created, filename, purpose, bytes, examples, "
                    "chats) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (id, owner, int(time.time()), name, purpose, size, *n),
                )
                note(connection, id)
        except BaseException:
            self.path(id).unlink(missing_ok=True)
            raise
        return self.get(id, owner)

    def path(self, id: str) -> Path:
        return self._folder / id

    def find(self, id: str, owner: str | None) -> StoredFile | None:
        """The file, if ``owner`` is its owner or None; else None."""
        rows = self._database.rows(
            "SELECT * FROM files WHERE id = ? AND (? IS NULL OR owner = ?)", id, owner, owner
        )
        return StoredFile.of(rows[0]) if rows else None

    def get(self, id: str, owner: str | None) -> StoredFile:
        """Raises ApiError 404."""
        file = self.find(id, owner)
        if file is None:
            raise ApiError(404, f"there is no file {id!r}", param="file_id", code="not_found")
        return file

    def page(self, owner: str | None, purpose: str | None, page: Page) -> list[StoredFile]:
        """The page's files and one more. Raises ApiError 404 for an unknown ``after``."""
        after = None if page.after is None else self.get(page.after, owner).number
        sign, order = ("<", "DESC") if page.newest else (">", "ASC")
        rows = self._database.rows(
            "SELECT * FROM files WHERE (?1 IS NULL OR owner = ?1) AND (?2 IS NULL OR purpose = ?2) "
            f"AND (?3 IS NULL OR number {sign} ?3) ORDER BY number {order} LIMIT ?4",
            *(owner, purpose, after, page.limit + 1),
        )
        return [StoredFile.of(row) for row in rows]

    def delete(self, file: StoredFile) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM files WHERE id = ?", (file.id,))
        self.path(file.id).unlink(missing_ok=True)

    def bytes_of(self, owner: str) -> int:
        (row,) = self._database.rows(
            "SELECT COALESCE(SUM(bytes), 0) AS total FROM files WHERE owner = ?", owner
        )
        return int(row["total"])

    def totals(self) -> tuple[int, int]:
        """Number of files, and their bytes."""
        (row,) = self._database.rows(
            "SELECT COUNT(*) AS files, COALESCE(SUM(bytes), 0) AS total FROM files"
        )
        return int(row["files"]), int(row["total"])
