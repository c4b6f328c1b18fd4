"""Uploaded files: their bytes are in a folder, their metadata in the database."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Row
from typing import Any, BinaryIO

from nybble.finetune.rows import DataError, read_rows
from nybble.server.http.errors import ApiError
from nybble.server.training.database import Database
from nybble.server.training.paging import Page

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


class Upload:
    """A file being uploaded. It counts against its owner's quota as it grows."""

    def __init__(self, files: Files, owner: str, path: Path, file: BinaryIO) -> None:
        self._files, self._owner, self.path, self._file = files, owner, path, file
        self.bytes = 0

    def write(self, chunk: bytes) -> None:
        """Raises ApiError 413 beyond a limit, and OSError if the disk is full."""
        self.bytes += len(chunk)
        self._files.require_room(self._owner, self.bytes)
        self._file.write(chunk)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


class Files:
    """Files by id. Every listed file is complete; an interrupted upload is removed."""

    def __init__(
        self, folder: Path, database: Database, *, max_file_bytes: int, quota_bytes: int
    ) -> None:
        self._folder = folder
        self._database = database
        self._max_file_bytes = max_file_bytes
        self._quota_bytes = quota_bytes
        self._uploads: list[Upload] = []
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
            upload = Upload(self, owner, path, file)
            self._uploads.append(upload)
            try:
                yield upload
            finally:
                self._uploads.remove(upload)
                path.unlink(missing_ok=True)

    def require_room(self, owner: str, size: int) -> None:
        """Raises ApiError 413 if an upload of ``size`` bytes exceeds a limit."""
        if size > self._max_file_bytes:
            raise ApiError(
                413,
                f"the file is larger than this server's limit of {self._max_file_bytes} bytes",
                param="file",
                code="file_too_large",
            )
        arriving = sum(upload.bytes for upload in self._uploads if upload._owner == owner)
        if self.bytes_of(owner) + arriving > self._quota_bytes:
            raise ApiError(
                413,
                f"your files together would be larger than the limit of {self._quota_bytes} bytes: "
                "delete some",
                param="file",
                code="storage_limit_exceeded",
            )

    def add(self, upload: Upload, *, filename: str, purpose: str, owner: str) -> StoredFile:
        """Check every line of training data and list the file.

        Raises ApiError 400 naming the first bad line.
        """
        upload.finish()
        examples = chats = 0
        if purpose == "fine-tune":
            examples, chats = _examples(upload.path)
        return self._list(upload.path, upload.bytes, filename, purpose, owner, examples, chats)

    def add_result(self, content: bytes, *, filename: str, owner: str) -> StoredFile:
        """Add a file that the server made, without checking the quota."""
        path = self._folder / (secrets.token_hex(12) + _PARTIAL)
        try:
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return self._list(path, len(content), filename, "fine-tune-results", owner, 0, 0)
        finally:
            path.unlink(missing_ok=True)

    def _list(
        self, path: Path, size: int, name: str, purpose: str, owner: str, *n: int
    ) -> StoredFile:
        id = "file-" + secrets.token_hex(12)
        # Move first, list second: if the server is killed in between, a start removes the file.
        path.replace(self.path(id))
        try:
            with self._database.transaction() as connection:
                connection.execute(
                    "INSERT INTO files (id, owner, created, filename, purpose, bytes, examples, "
                    "chats) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (id, owner, int(time.time()), name, purpose, size, *n),
                )
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


def _examples(path: Path) -> tuple[int, int]:
    examples = chats = 0
    try:
        for _, row in read_rows(path):
            examples += 1
            chats += isinstance(row.get("messages"), list)
    except DataError as error:
        where = "the file" if error.line is None else f"line {error.line}:"
        raise ApiError(400, f"{where} {error.reason}", param="file", code="invalid_file") from None
    if not examples:
        raise ApiError(400, "the file has no examples", param="file", code="invalid_file")
    return examples, chats
