"""What becomes of the jobs that a server finds when it starts; no process is begun here."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nybble.server.files import database as database_module
from nybble.server.files.database import Database
from nybble.server.files.files import Files, StoredFile
from nybble.server.files.paging import Page
from nybble.server.training.examples import count_examples
from nybble.server.training.jobs import UNFINISHED, Job, Jobs, Status
from nybble.server.training.runner import Runner
from nybble.server.training.settings import TrainingSettings


@dataclass
class Parts:
    jobs: Jobs
    files: Files
    settings: TrainingSettings
    folder: Path
    served: set[str]

    def runner(self, *, has_template: bool = True) -> Runner:
        return Runner(
            self.jobs,
            self.files,
            self.settings,
            Path("base"),
            self.folder,
            models=("tiny",),
            publish=lambda job, name: self.served.add(name),
            withdraw=self.served.discard,
            has_template=has_template,
        )

    def file(self, content: bytes = b'{"text": "moon"}') -> StoredFile:
        with self.files.upload("acme") as upload:
            upload.write(content)
            return self.files.add(upload, filename="f", purpose="fine-tune", owner="acme")

    def job(self, status: Status = "validating_files", **request: Any) -> Job:
        body = {"model": "tiny", "training_file": self.file().id, **request}
        job = self.jobs.create("acme", body, {"model": "ft:tiny:acme"})
        self.jobs.move(job, status, "as a server left it")
        return self.jobs.get(job.id, None)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    database = Database(tmp_path)
    settings = TrainingSettings(device="cpu", max_rank=8)
    limits = {"max_file_bytes": 1 << 20, "quota_bytes": 1 << 20}
    checks = {"fine-tune": count_examples}
    files = Files(tmp_path / "files", database, **limits, checks=checks)
    yield Parts(Jobs(database), files, settings, tmp_path / "jobs", set())
    database.close()


def error_of(parts: Parts, job: Job) -> str:
    found = parts.jobs.get(job.id, None)
    assert (found.status, found.finished is not None) == ("failed", True)
    assert found.error is not None
    return str(found.error["message"])


async def started(parts: Parts, runner: Runner) -> None:
    """Run it until every job is finished."""
    task = asyncio.create_task(runner.run())
    async with asyncio.timeout(60):
        while parts.jobs.with_status(*UNFINISHED):
            await asyncio.sleep(0.02)
    task.cancel()


def test_jobs_of_another_model_fail_and_say_so(parts: Parts) -> None:
    statuses: tuple[Status, ...] = ("validating_files", "queued", "running")
    jobs = [parts.job(status, model="old") for status in statuses]
    asyncio.run(started(parts, parts.runner()))
    assert {error_of(parts, job) for job in jobs} == {"this server no longer serves 'old'"}


def test_a_job_that_was_running_whenever_the_server_ended_is_given_up(parts: Parts) -> None:
    job = parts.job()
    for _ in range(3):
        parts.jobs.move(parts.jobs.get(job.id, None), "running", "begun")
    asyncio.run(started(parts, parts.runner()))
    assert error_of(parts, job) == "the server ended 3 times while the job was running"


def test_files_that_went_away_or_need_a_chat_template_fail_their_job(parts: Parts) -> None:
    gone = parts.job()
    parts.files.path(gone.files[0]).unlink()
    chat = b'{"messages": [{"role": "assistant", "content": "x"}]}'
    talking = parts.job(training_file=parts.file().id, validation_file=parts.file(chat).id)
    asyncio.run(started(parts, parts.runner(has_template=False)))
    assert "is no longer there" in error_of(parts, gone)
    assert error_of(parts, talking).startswith("the model has no chat template")
    found = parts.jobs.get(talking.id, None)
    assert found.error is not None
    assert found.error["param"] == "validation_file"


def test_a_cancelled_job_stays_cancelled(parts: Parts) -> None:
    job = parts.job("queued")
    runner = parts.runner()
    assert runner.cancel(job)
    assert not runner.cancel(job)
    assert not parts.jobs.move(job, "running", "begun")
    assert not parts.jobs.move(job, "succeeded", "done")
    assert parts.jobs.get(job.id, None).status == "cancelled"


async def trained(_: Job) -> dict[str, Any]:
    """In place of a worker: what it reports at its end."""
    best = {"step": 0, "train_loss": None, "valid_loss": 3.5}  # nothing was better than the start
    return {"done": {"tokens": 5, "best": best, "peak_bytes": 1, "base_bytes": 1}}


def test_an_adapter_whose_job_fails_at_the_very_end_is_not_served(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, move = parts.job("running"), parts.jobs.move

    def full_at_the_end(job: Job, to: Status, *words: str, **values: Any) -> bool:
        if to == "succeeded":
            raise sqlite3.OperationalError("database or disk is full")
        return move(job, to, *words, **values)

    monkeypatch.setattr(parts.jobs, "move", full_at_the_end)
    runner = parts.runner()
    monkeypatch.setattr(runner, "_train", trained)
    asyncio.run(runner._run(job))
    assert error_of(parts, job) == "database or disk is full"
    assert parts.served == set()
    assert {file.purpose for file in parts.files.page("acme", None, Page(9, None))} == {"fine-tune"}


def test_a_disk_that_is_full_for_a_while_ends_no_queue(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database_module, "RETRY_SECONDS", 0.01)
    job, failures = parts.job(), iter(range(12))

    def sometimes(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(failures, None) is not None:
                raise sqlite3.OperationalError("database or disk is full")
            return function(*arguments, **options)

        return call

    runner = parts.runner()
    monkeypatch.setattr(runner, "_train", trained)
    for name in ("move", "with_status"):
        monkeypatch.setattr(parts.jobs, name, sometimes(getattr(parts.jobs, name)))

    async def scenario() -> None:
        task = asyncio.create_task(runner.run())
        async with asyncio.timeout(60):
            while parts.jobs.get(job.id, None).status != "succeeded":
                assert not task.done()
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(scenario())
    assert parts.served == {"ft:tiny:acme"}
    warned = [each for each in parts.jobs.events(job, Page(99, None)) if each.level == "warn"]
    assert ["the adapter changes nothing" in each.message for each in warned] == [True]
    assert "fine-tuning jobs wait 0.01 s: database or disk is full" in caplog.text
