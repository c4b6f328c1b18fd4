"""What becomes of the jobs that a server finds when it starts; no process is begun here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nybble.server.fine_tuning.database import Database
from nybble.server.fine_tuning.files import Files, StoredFile
from nybble.server.fine_tuning.jobs import UNFINISHED, Job, Jobs, Status
from nybble.server.fine_tuning.runner import Runner
from nybble.server.fine_tuning.settings import FineTuningSettings


@dataclass
class Parts:
    jobs: Jobs
    files: Files
    settings: FineTuningSettings

    def runner(self, *, has_template: bool = True) -> Runner:
        return Runner(
            self.jobs,
            self.files,
            self.settings,
            Path("base"),
            models=("tiny",),
            publish=lambda job, name: None,
            withdraw=lambda name: None,
            has_template=has_template,
        )

    def file(self, content: bytes = b'{"text": "moon"}') -> StoredFile:
        with self.files.upload("acme") as upload:
            upload.write(content)
            return self.files.add(upload, filename="f", purpose="fine-tune", owner="acme")

    def job(self, status: Status = "validating_files", **request: Any) -> Job:
        body = {"model": "tiny", "training_file": self.file().id, **request}
        job = self.jobs.create("acme", body, {})
        self.jobs.move(job, status, "as a server left it")
        return self.jobs.get(job.id, None)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    database = Database(tmp_path)
    settings = FineTuningSettings(state=tmp_path, device="cpu", max_rank=8)
    files = Files(tmp_path / "files", database, max_file_bytes=1 << 20, quota_bytes=1 << 20)
    yield Parts(Jobs(database), files, settings)
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
