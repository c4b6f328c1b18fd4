"""Jobs and their events in the database."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from sqlite3 import Connection, Row
from typing import Any, Literal

from nybble.finetune import Progress
from nybble.server.files.database import Database
from nybble.server.files.paging import Page
from nybble.server.http.errors import ApiError

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = (
    *("validating_files", "queued", "running"),
    *("succeeded", "failed", "cancelled"),
)
UNFINISHED: tuple[Status, ...] = ("validating_files", "queued", "running")
Level = Literal["info", "warn", "error"]


@dataclass(frozen=True)
class Job:
    """A fine-tuning job.

    request: the body it was created with.
    plan: see plan.py.
    step: the last step that was reported.
    steps: how many there are in all.
    attempts: how often it was started.
    best: the saved adapter's step and losses.
    model: the name that its adapter is served by.
    """

    number: int
    id: str
    owner: str
    created: int
    status: Status
    request: dict[str, Any]
    plan: dict[str, Any]
    attempts: int
    started: int | None
    finished: int | None
    step: int
    steps: int
    tokens: int | None
    model: str | None
    result_file: str | None
    best: dict[str, Any] | None
    error: dict[str, Any] | None

    @classmethod
    def of(cls, row: Row) -> Job:
        values = dict(row)
        for name in ("request", "plan", "best", "error"):
            values[name] = None if values[name] is None else json.loads(values[name])
        return cls(**values)

    @property
    def files(self) -> list[str]:
        names = ("training_file", "validation_file")
        return [self.request[name] for name in names if name in self.request]


@dataclass(frozen=True)
class JobEvent:
    number: int
    id: str
    job: str
    created: int
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] | None

    def body(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "fine_tuning.job.event",
            "created_at": self.created,
            "level": self.level,
            "type": self.type,
            "message": self.message,
            "data": self.data,
        }


class Jobs:
    """Jobs by id. A status and the event that reports it change in one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, owner: str, request: dict[str, Any], plan: dict[str, Any]) -> Job:
        id = "ftjob-" + secrets.token_hex(12)
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO jobs (id, owner, created, status, request, plan) "
                "VALUES (?, ?, ?, 'validating_files', ?, ?)",
                (id, owner, int(time.time()), json.dumps(request), json.dumps(plan)),
            )
            _add_event(connection, id, "info", f"Created fine-tuning job: {id}")
        return self.get(id, owner)

    def find(self, id: str, owner: str | None) -> Job | None:
        """The job, if ``owner`` is its owner or None; else None."""
        rows = self._database.rows(
            "SELECT * FROM jobs WHERE id = ? AND (? IS NULL OR owner = ?)", id, owner, owner
        )
        return Job.of(rows[0]) if rows else None

    def get(self, id: str, owner: str | None) -> Job:
        """Raises ApiError 404."""
        job = self.find(id, owner)
        if job is None:
            raise ApiError(
                404,
                f"there is no fine-tuning job {id!r}",
                param="fine_tuning_job_id",
                code="not_found",
            )
        return job

    def page(self, owner: str | None, page: Page) -> list[Job]:
        """Newest first, one more than the page takes. Raises ApiError 404 for an unknown after."""
        after = None if page.after is None else self.get(page.after, owner).number
        rows = self._database.rows(
            "SELECT * FROM jobs WHERE (?1 IS NULL OR owner = ?1) AND (?2 IS NULL OR number < ?2) "
            "ORDER BY number DESC LIMIT ?3",
            *(owner, after, page.limit + 1),
        )
        return [Job.of(row) for row in rows]

    def with_status(self, *statuses: Status) -> list[Job]:
        """Oldest first."""
        marks = ", ".join("?" * len(statuses))
        rows = self._database.rows(
            f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY number", *statuses
        )
        return [Job.of(row) for row in rows]

    def by_model(self, model: str) -> Job | None:
        rows = self._database.rows("SELECT * FROM jobs WHERE model = ?", model)
        return Job.of(rows[0]) if rows else None

    def counts(self) -> dict[Status, int]:
        rows = self._database.rows("SELECT status, COUNT(*) AS jobs FROM jobs GROUP BY status")
        found = Counter({row["status"]: row["jobs"] for row in rows})
        return {status: found[status] for status in STATUSES}

    def move(
        self,
        job: Job,
        to: Status,
        message: str,
        *,
        level: Level = "info",
        **values: Any,
    ) -> bool:
        """Set the job's status and ``values``; returns False if it has finished already."""
        if to == "running":
            values |= {"started": job.started or int(time.time()), "attempts": job.attempts + 1}
        elif to not in UNFINISHED:
            values |= {"finished": int(time.time())}
        values = {
            name: json.dumps(value) if isinstance(value, dict) else value
            for name, value in values.items()
        }
        sets = "".join(f", {name} = ?" for name in values)
        with self._database.transaction() as connection:
            changed = connection.execute(
                f"UPDATE jobs SET status = ?{sets} WHERE id = ? AND status IN (?, ?, ?)",
                (to, *values.values(), job.id, *UNFINISHED),
            ).rowcount
            if changed:
                _add_event(connection, job.id, level, message)
        return bool(changed)

    def forget_model(self, job: Job) -> None:
        with self._database.transaction() as connection:
            connection.execute("UPDATE jobs SET model = NULL WHERE id = ?", (job.id,))
            _add_event(connection, job.id, "info", f"Model deleted: {job.model}")

    def tell(self, job: Job, message: str, *, level: Level = "info") -> None:
        with self._database.transaction() as connection:
            _add_event(connection, job.id, level, message)

    def advance(self, job: Job, progress: Progress) -> bool:
        """Record a step, unless it is recorded already: a resumed run repeats some."""
        point = progress.point
        data: dict[str, Any] = {
            "step": point.step,
            "total_steps": progress.steps,
            "epoch": round(progress.epoch, 4),
            "train_loss": point.train_loss,
            "learning_rate": progress.learning_rate,
        }
        message = f"Step {point.step}/{progress.steps}: training loss={point.train_loss:.4f}"
        if point.eval_loss is not None:
            data["valid_loss"] = point.eval_loss
            message += f", validation loss={point.eval_loss:.4f}"
        with self._database.transaction() as connection:
            changed = connection.execute(
                "UPDATE jobs SET step = ?1, steps = ?2, tokens = ?3 "
                "WHERE id = ?4 AND step < ?1 AND status = 'running'",
                (point.step, progress.steps, progress.tokens, job.id),
            ).rowcount
            if changed:
                _add_event(connection, job.id, "info", message, data)
        return bool(changed)

    def events(self, job: Job, page: Page) -> list[JobEvent]:
        """Newest first, one more than the page takes. Raises ApiError 404 for an unknown after."""
        after = None
        if page.after is not None:
            found = self._database.rows(
                "SELECT number FROM events WHERE id = ? AND job = ?", page.after, job.id
            )
            if not found:
                message = f"there is no event {page.after!r} of this job"
                raise ApiError(404, message, param="after", code="not_found")
            after = found[0]["number"]
        rows = self._database.rows(
            "SELECT * FROM events WHERE job = ?1 AND (?2 IS NULL OR number < ?2) "
            "ORDER BY number DESC LIMIT ?3",
            *(job.id, after, page.limit + 1),
        )
        return [_event(row) for row in rows]

    def metrics(self, job: Job) -> list[dict[str, Any]]:
        """The data of its metrics events, in order."""
        rows = self._database.rows(
            "SELECT * FROM events WHERE job = ? AND type = 'metrics' ORDER BY number", job.id
        )
        return [data for row in rows if (data := _event(row).data) is not None]


def _event(row: Row) -> JobEvent:
    values = dict(row)
    return JobEvent(**{**values, "data": values["data"] and json.loads(values["data"])})


def _add_event(
    connection: Connection,
    job: str,
    level: Level,
    message: str,
    data: dict[str, Any] | None = None,
) -> None:
    connection.execute(
        "INSERT INTO events (id, job, created, level, type, message, data) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            "ftevent-" + secrets.token_hex(12),
            job,
            int(time.time()),
            level,
            "message" if data is None else "metrics",
            message,
            None if data is None else json.dumps(data),
        ),
    )
