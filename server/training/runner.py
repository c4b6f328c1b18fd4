"""Runs the queued jobs, one at a time, each in a process of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nybble.finetune import Progress
from nybble.finetune.train import NOTHING_LEARNED, Point
from nybble.server.files.database import until_recorded
from nybble.server.files.files import Files
from nybble.server.observability.logs import LogEvent
from nybble.server.training.jobs import Job, Jobs
from nybble.server.training.results import results_csv
from nybble.server.training.settings import TrainingSettings

logger = logging.getLogger(__name__)

_WORKER = "nybble.server.training.worker"
# A job that ran each time the server was killed may be the cause.
_MAX_ATTEMPTS = 3
_LINE_BYTES = 1 << 20
_LOG_TAIL = 2000


class Runner:
    """Runs the jobs in the database, oldest first, and records their results there.

    base: the folder of the model.
    folder: of the jobs.
    publish: serves a finished job's adapter by the name ``Job.model``.
    withdraw: stops serving the adapter of this name.
    """

    def __init__(
        self,
        jobs: Jobs,
        files: Files,
        settings: TrainingSettings,
        base: Path,
        folder: Path,
        *,
        models: tuple[str, ...],
        publish: Callable[[Job, str], None],
        withdraw: Callable[[str], None],
        has_template: bool,
    ) -> None:
        self._jobs = jobs
        self._files = files
        self._settings = settings
        self._base = base
        self._folder = folder
        self._models = models
        self._publish = publish
        self._withdraw = withdraw
        self._has_template = has_template
        self._created, self._queued = asyncio.Event(), asyncio.Event()
        self._running: tuple[str, Process] | None = None

    def folder(self, job: Job) -> Path:
        return self._folder / job.id

    def adapter_folder(self, job: Job) -> Path:
        return self.folder(job) / "adapter"

    def serves_base_of(self, job: Job) -> bool:
        """Whether the job trained on this server's model; the folder may have served another."""
        return job.request["model"] in self._models

    def wake(self) -> None:
        """Look for a new job."""
        self._created.set()

    def cancel(self, job: Job) -> bool:
        """End a job; returns False if it has finished already."""
        if not self._jobs.move(job, "cancelled", "Fine-tuning job cancelled"):
            return False
        if self._running is not None and self._running[0] == job.id:
            with suppress(ProcessLookupError):
                self._running[1].kill()
        return True

    async def run(self) -> None:
        """Run jobs until cancelled. The next server continues a job that is running then."""
        await until_recorded(self._requeue)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._validate_created())
            both.create_task(self._train_queued())

    async def _validate_created(self) -> None:
        while True:
            self._created.clear()
            await until_recorded(self._validate_new)
            self._queued.set()
            await self._created.wait()

    async def _train_queued(self) -> None:
        while True:
            self._queued.clear()
            queued = await until_recorded(self._jobs.with_status, "queued")
            if queued:
                await self._run(queued[0])
            else:
                await self._queued.wait()

    def _validate_new(self) -> None:
        """Queue the created jobs whose files fit this model, and fail the others."""
        for job in self._jobs.with_status("validating_files"):
            if error := self._unfit(job):
                self._fail(job, error)
            else:
                self._jobs.move(job, "queued", "Files validated, moving job to queued state")

    def _unfit(self, job: Job) -> dict[str, Any] | None:
        if not self.serves_base_of(job):
            message = f"this server no longer serves {job.request['model']!r}"
            return _error("model_not_found", message, "model")
        for param in ("training_file", "validation_file"):
            id = job.request.get(param)
            if id is None:
                continue
            file = self._files.find(id, None)
            if file is None or not self._files.path(id).is_file():
                return _error("file_not_found", f"the file {id} is no longer there", param)
            if file.chats and not self._has_template:
                message = "the model has no chat template; use 'prompt' and 'completion'"
                return _error("invalid_file", message, param)
        return None

    def _requeue(self) -> None:
        """Queue the jobs that were running or waiting when the last server ended."""
        for job in self._jobs.with_status("queued"):
            if error := self._unfit(job):
                self._fail(job, error)
        for job in self._jobs.with_status("running"):
            if error := self._unfit(job):
                self._fail(job, error)
            elif job.attempts >= _MAX_ATTEMPTS:
                message = f"the server ended {job.attempts} times while the job was running"
                self._fail(job, _error("server_error", message))
            else:
                message = "The server was restarted; the job goes on from its last checkpoint"
                self._jobs.move(job, "queued", message, level="warn")

    async def _run(self, job: Job) -> None:
        try:
            report = await self._train(job)
            if report is not None:
                await asyncio.to_thread(self._finish, job, report)
        except Exception as error:
            # One job's failure must not stop the queue.
            logger.error("fine-tuning job %s failed", job.id, exc_info=True)
            await until_recorded(self._fail, job, _error("server_error", str(error)))

    async def _train(self, job: Job) -> dict[str, Any] | None:
        """The worker's last report; None if the job was cancelled."""
        if not await asyncio.to_thread(self._jobs.move, job, "running", "Fine-tuning job started"):
            return None
        logger.info(
            LogEvent("fine_tuning", {"job": job.id, "owner": job.owner, "status": "running"})
        )
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        spec = folder / "spec.json"
        spec.write_text(json.dumps(self._spec(job)))
        # One thread pool, and none that spins while it waits.
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(self._settings.threads),
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with (folder / "log.txt").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                # -P: nothing may be imported from the server's working directory.
                *(sys.executable, "-P", "-m", _WORKER, str(spec)),
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                env=env,
                limit=_LINE_BYTES,
            )
        self._running = job.id, process
        last: dict[str, Any] = {}
        code = 0
        try:
            # Cancelled while the process was being started.
            current = await asyncio.to_thread(self._jobs.get, job.id, None)
            if current.status == "running":
                assert process.stdout is not None
                async for line in process.stdout:
                    last = json.loads(line)
                    if "step" in last:
                        await asyncio.to_thread(self._jobs.advance, job, _progress(last["step"]))
                code = await process.wait()
        finally:
            self._running = None
            if process.returncode is None:
                process.kill()
                await process.wait()
        current = await asyncio.to_thread(self._jobs.get, job.id, None)
        if current.status != "running":
            shutil.rmtree(folder, ignore_errors=True)
            return None
        if "done" in last or "failed" in last:
            return last
        message = f"the training process ended with exit code {code}"
        if code == -9:
            message = "the training process was killed, most likely for want of memory"
        return {"failed": _error("training_failed", f"{message}: {self._log_tail(job)}")}

    def _spec(self, job: Job) -> dict[str, Any]:
        validation = job.request.get("validation_file")
        return {
            "base": str(self._base),
            "data": str(self._files.path(job.request["training_file"])),
            "validation": None if validation is None else str(self._files.path(validation)),
            "out": str(self.adapter_folder(job)),
            "settings": job.plan["settings"],
            "device": self._settings.device,
            "threads": self._settings.threads,
            "nice": self._settings.nice,
        }

    def _log_tail(self, job: Job) -> str:
        log = (self.folder(job) / "log.txt").read_text(errors="replace").strip()
        return log[-_LOG_TAIL:].rpartition("\n")[2] or "it wrote no message"

    def _finish(self, job: Job, report: dict[str, Any]) -> None:
        if "failed" in report:
            self._fail(job, report["failed"])
            return
        done, model = report["done"], job.plan["model"]
        result = self._files.add_result(
            results_csv(self._jobs.metrics(job)), filename="step_metrics.csv", owner=job.owner
        )
        succeeded = False
        try:
            self._publish(job, model)
            self._jobs.tell(job, f"New fine-tuned model created: {model}")
            if not done["best"]["step"]:
                self._jobs.tell(job, NOTHING_LEARNED, level="warn")
            succeeded = self._jobs.move(
                job,
                "succeeded",
                "The job has successfully completed",
                model=model,
                tokens=done["tokens"],
                best=done["best"],
                result_file=result.id,
            )
        finally:
            if not succeeded:  # cancelled meanwhile, or not to be recorded
                self._withdraw(model)
                self._files.delete(result)
        if not succeeded:
            shutil.rmtree(self.folder(job), ignore_errors=True)
            return
        fields = {"job": job.id, "status": "succeeded", "model": model}
        memory = {name: done[name] for name in ("peak_bytes", "base_bytes")}
        logger.info(LogEvent("fine_tuning", {**fields, **memory}))

    def _fail(self, job: Job, error: dict[str, Any]) -> None:
        if self._jobs.move(job, "failed", error["message"], level="error", error=error):
            fields = {"job": job.id, "status": "failed", "error": error["message"]}
            logger.warning(LogEvent("fine_tuning", fields))
        shutil.rmtree(self.adapter_folder(job), ignore_errors=True)  # the log stays


def _progress(told: dict[str, Any]) -> Progress:
    return Progress(**{**told, "point": Point(**told["point"])})


def _error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param}
