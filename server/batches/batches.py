"""Batches in the database."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from sqlite3 import Connection, Row
from typing import Any, Literal, get_args

from nybble.server.batches.lines import Endpoint
from nybble.server.files.database import Database
from nybble.server.files.paging import Page
from nybble.server.http.errors import ApiError

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "cancelling",
    "completed",
    "failed",
    "expired",
    "cancelled",
]
STATUSES: tuple[Status, ...] = get_args(Status)
UNFINISHED: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
WINDOW_SECONDS = 24 * 3600
PURPOSE, OUTPUT_PURPOSE = "batch", "batch_output"  # of files


@dataclass(frozen=True)
class Batch:
    """A batch.

    request: the body it was created with.
    times: when each status began, by its name.
    total, completed, failed: requests, as of the last status but one.
    stuck: starts of a server since a line was finished.
    """

    number: int
    id: str
    owner: str
    created: int
    expires: int
    status: Status
    request: dict[str, Any]
    model: str | None
    errors: list[dict[str, Any]] | None
    times: dict[str, int]
    total: int
    completed: int
    failed: int
    output_file: str | None
    error_file: str | None
    stuck: int

    @classmethod
    def of(cls, row: Row) -> Batch:
        values = dict(row)
        for name in ("request", "errors", "times"):
            values[name] = None if values[name] is None else json.loads(values[name])
        return cls(**values)

    @property
    def endpoint(self) -> Endpoint:
        endpoint: Endpoint = self.request["endpoint"]
        return endpoint

    @property
    def input_file(self) -> str:
        return str(self.request["input_file_id"])

    def body(self) -> dict[str, Any]:
        times = {f"{status}_at": self.times.get(status) for status in STATUSES[1:]}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": None if self.errors is None else {"object": "list", "data": self.errors},
            "input_file_id": self.input_file,
            "completion_window": self.request["completion_window"],
            "status": self.status,
            "output_file_id": self.output_file,
            "error_file_id": self.error_file,
            "created_at": self.created,
            "expires_at": self.expires,
            **times,
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "metadata": self.request.get("metadata"),
        }


class Batches:
    """Batches by id."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, owner: str, request: dict[str, Any]) -> Batch:
        id, now = "batch_" + secrets.token_hex(12), int(time.time())
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO batches (id, owner, created, expires, status, request, times) "
                "VALUES (?, ?, ?, ?, 'validating', ?, '{}')",
                (id, owner, now, now + WINDOW_SECONDS, json.dumps(request)),
            )
        return self.get(id, owner)

    def find(self, id: str, owner: str | None) -> Batch | None:
        """The batch, if ``owner`` is its owner or None; else None."""
        rows = self._database.rows(
            "SELECT * FROM batches WHERE id = ? AND (? IS NULL OR owner = ?)", id, owner, owner
        )
        return Batch.of(rows[0]) if rows else None

    def get(self, id: str, owner: str | None) -> Batch:
        """Raises ApiError 404."""
        batch = self.find(id, owner)
        if batch is None:
            raise ApiError(404, f"there is no batch {id!r}", param="batch_id", code="not_found")
        return batch

    def page(self, owner: str | None, page: Page) -> list[Batch]:
        """Newest first, one more than the page takes. Raises ApiError 404 for an unknown after."""
        after = None if page.after is None else self.get(page.after, owner).number
        rows = self._database.rows(
            "SELECT * FROM batches WHERE (?1 IS NULL OR owner = ?1) "
            "AND (?2 IS NULL OR number < ?2) ORDER BY number DESC LIMIT ?3",
            *(owner, after, page.limit + 1),
        )
        return [Batch.of(row) for row in rows]

    def unfinished(self) -> list[Batch]:
        """Oldest first."""
        marks = ", ".join("?" * len(UNFINISHED))
        rows = self._database.rows(
            f"SELECT * FROM batches WHERE status IN ({marks}) ORDER BY number", *UNFINISHED
        )
        return [Batch.of(row) for row in rows]

    def counts(self) -> dict[Status, int]:
        rows = self._database.rows(
            "SELECT status, COUNT(*) AS batches FROM batches GROUP BY status"
        )
        found = Counter({row["status"]: row["batches"] for row in rows})
        return {status: found[status] for status in STATUSES}

    def move(self, batch: Batch, to: Status, *, since: tuple[Status, ...], **values: Any) -> bool:
        """Set the status and ``values``; returns False unless the status was one of ``since``."""
        marks = ", ".join("?" * len(since))
        sets = "".join(f", {name} = ?" for name in values)
        given = [
            json.dumps(value) if isinstance(value, list) else value for value in values.values()
        ]
        with self._database.transaction() as connection:
            changed = connection.execute(
                "UPDATE batches SET status = ?, times = json_set(times, '$.' || ?, ?)"
                f"{sets} WHERE id = ? AND status IN ({marks})",
                (to, to, int(time.time()), *given, batch.id, *since),
            ).rowcount
        return bool(changed)

    def record(self, batch: Batch, **values: Any) -> None:
        """Set values that are not the status."""
        sets = ", ".join(f"{name} = ?" for name in values)
        with self._database.transaction() as connection:
            connection.execute(
                f"UPDATE batches SET {sets} WHERE id = ?", (*values.values(), batch.id)
            )


def note_file(connection: Connection, file: str, *, batch: Batch, column: str) -> None:
    """Record a batch's file in a transaction of another's. column: output_file or error_file."""
    connection.execute(f"UPDATE batches SET {column} = ? WHERE id = ?", (file, batch.id))
