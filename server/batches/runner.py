"""Runs the batches in the database, their lines side by side."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nybble.server.api.model_names import ModelNames
from nybble.server.batches.answers import Answer, Answers
from nybble.server.batches.batches import (
    OUTPUT_PURPOSE,
    UNFINISHED,
    Batch,
    Batches,
    Status,
    note_file,
)
from nybble.server.batches.lines import LineIndex
from nybble.server.batches.results import EXPIRED, Results
from nybble.server.files.database import until_recorded
from nybble.server.files.files import Files, Growing
from nybble.server.http.errors import ApiError
from nybble.server.observability.logs import LogEvent
from nybble.server.tenancy.tenants import Tenant

logger = logging.getLogger(__name__)

# Starts of a server without a line being finished, after which a line may be what ends servers.
_MAX_STUCK = 5
_FLUSH_SECONDS = 5.0  # for results that are being written when the server ends
_EXPIRED_MESSAGE = "this request could not be answered within the completion window"


@dataclass
class Running:
    """A batch whose lines are being answered."""

    results: Results
    time_left: asyncio.Timeout


class Runner:
    """Answers the lines of all unfinished batches, and records what they come to.

    A line's result is on disk before the line counts as done, and a start begins with the results
    that it finds. So no line is answered twice but those which a killed server was answering.
    """

    def __init__(
        self,
        batches: Batches,
        files: Files,
        folder: Path,
        answers: Answers,
        names: ModelNames,
        tenant_of: Callable[[str], Tenant | None],
        places: int,
    ) -> None:
        """folder: of unfinished results. tenant_of: by the owner; raises ApiError if it is gone.
        places: lines that are prepared or answered at a time."""
        self._batches = batches
        self._files = files
        self._folder = folder
        self._answers = answers
        self._names = names
        self._tenant_of = tenant_of
        self._places = asyncio.Semaphore(places)
        self._created = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, Running] = {}
        self._stopped: set[str] = set()

    def wake(self) -> None:
        """Look for a new batch."""
        self._created.set()

    def as_it_is(self, batch: Batch) -> Batch:
        """The batch with the counts of this moment."""
        running = self._running.get(batch.id)
        if running is None:
            return batch
        results = running.results
        return replace(batch, completed=results.completed, failed=results.failed)

    def stop(self, batch: Batch) -> None:
        """Answer no more of its lines, because it has been cancelled."""
        self._stopped.add(batch.id)
        if (running := self._running.get(batch.id)) is not None:
            running.time_left.reschedule(0)

    async def run(self) -> None:
        """Run batches until cancelled. The next server continues those that are unfinished then."""
        await until_recorded(self._remove_finished)
        try:
            while True:
                self._created.clear()
                for batch in await until_recorded(self._batches.unfinished):
                    if batch.id not in self._tasks:
                        task = asyncio.create_task(self._run(batch))
                        self._tasks[batch.id] = task
                        task.add_done_callback(partial(self._forget, batch.id))
                await self._created.wait()
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _remove_finished(self) -> None:
        """Remove what a killed server left of batches that had ended."""
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = {batch.id for batch in self._batches.unfinished()}
        for path in self._folder.iterdir():
            if path.name not in unfinished:
                shutil.rmtree(path)

    def _forget(self, id: str, _: asyncio.Task[None]) -> None:
        del self._tasks[id]
        self._stopped.discard(id)

    async def _run(self, batch: Batch) -> None:
        try:
            await self._advance(batch)
        except Exception as error:
            # One batch's failure must not stop the others.
            logger.error("batch %s failed", batch.id, exc_info=True)
            cause: BaseException = error
            while isinstance(cause, BaseExceptionGroup):
                cause = cause.exceptions[0]
            await until_recorded(
                self._fail, batch, [{"code": "server_error", "message": str(cause)}]
            )

    async def _advance(self, batch: Batch) -> None:
        """Take a batch from the status it has to its end."""
        try:
            index = await asyncio.to_thread(self._checked, batch, self._tenant_of(batch.owner))
        except ApiError as error:
            errors = [{"code": error.code, "message": error.message, "param": error.param}]
            await until_recorded(self._fail, batch, errors)
            return
        if index.errors:
            await until_recorded(self._fail, batch, index.errors)
            return
        results = await until_recorded(self._begin, batch, index)
        if results is None:
            message = f"the server ended {_MAX_STUCK} times without finishing one of its lines"
            await until_recorded(self._fail, batch, [{"code": "server_error", "message": message}])
            return
        with self._files.growing(Growing(batch.owner, results.bytes)) as growing:
            try:
                await self._answer_all(batch, index, results, growing)
                await until_recorded(self._finish, batch, index, results, growing)
            finally:
                self._running.pop(batch.id, None)

    def _checked(self, batch: Batch, tenant: Tenant | None) -> LineIndex:
        """The lines of the batch. Raises ApiError if they cannot be answered."""
        if batch.status in ("finalizing", "cancelling"):
            return LineIndex(Path())  # no more of it is answered
        if self._files.find(batch.input_file, None) is None:
            message = f"the file {batch.input_file} is no longer there"
            raise ApiError(404, message, param="input_file_id", code="file_not_found")
        index = LineIndex.read(self._files.path(batch.input_file), batch.endpoint)
        if not index.errors:
            self._names.require_possible(index.model or self._names.first, tenant)
        return index

    def _begin(self, batch: Batch, index: LineIndex) -> Results | None:
        """The results so far; None if servers end before a line is finished."""
        results = Results.in_folder(self._folder / batch.id)
        counts = {"completed": results.completed, "failed": results.failed}
        if batch.status == "validating":
            told = {"total": len(index.offsets), "model": index.model or self._names.first}
            self._batches.move(batch, "in_progress", since=("validating",), **told)
            logger.info(LogEvent("batch", {"batch": batch.id, "owner": batch.owner, **told}))
        elif batch.status == "in_progress":
            progress = counts != {"completed": batch.completed, "failed": batch.failed}
            stuck = 0 if progress else batch.stuck + 1
            if stuck > _MAX_STUCK:
                return None
            self._batches.record(batch, stuck=stuck, **counts)
        return results

    async def _answer_all(
        self,
        batch: Batch,
        index: LineIndex,
        results: Results,
        growing: Growing,
    ) -> None:
        """Answer the lines that have no result, until the batch is cancelled or expires."""
        answered: asyncio.Queue[tuple[str, Answer] | None] = asyncio.Queue()
        tenant_of = partial(self._tenant_of, batch.owner)  # a batch may run for a day

        async def answer(position: int) -> None:
            line = await asyncio.to_thread(index.line, position)
            found = await asyncio.to_thread(self._no_room, line.custom_id, growing, 1)
            found = found or await self._answers.answer(line, tenant_of)
            answered.put_nowait((line.custom_id, found))

        def ended(task: asyncio.Task[None]) -> None:
            if task.cancelled() or task.exception() is not None:
                self._places.release()  # else once its result is on disk

        left = [i for i, id in enumerate(index.custom_ids) if id not in results.done]
        now = await until_recorded(self._batches.get, batch.id, None)
        if now.status != "in_progress" or batch.id in self._stopped:
            return
        writing = asyncio.create_task(self._record_all(answered, results, growing))
        try:
            with suppress(TimeoutError):
                async with (
                    asyncio.timeout(max(0.0, batch.expires - time.time())) as time_left,
                    asyncio.TaskGroup() as lines,
                ):
                    self._running[batch.id] = Running(results, time_left)
                    for position in left:
                        # Batches take turns: a place goes to the one that has waited longest.
                        await self._places.acquire()
                        lines.create_task(answer(position)).add_done_callback(ended)
            answered.put_nowait(None)
            await writing
        finally:
            answered.put_nowait(None)
            await asyncio.wait([writing], timeout=_FLUSH_SECONDS)
            writing.cancel()

    async def _record_all(
        self,
        answered: asyncio.Queue[tuple[str, Answer] | None],
        results: Results,
        growing: Growing,
    ) -> None:
        while (item := await answered.get()) is not None:
            await until_recorded(self._record, *item, results, growing)
            self._places.release()

    def _record(self, custom_id: str, answer: Answer, results: Results, growing: Growing) -> None:
        if answer.ok:
            answer = self._no_room(custom_id, growing, len(answer.data)) or answer
        results.add(custom_id, answer)
        growing.bytes = results.bytes

    def _no_room(self, custom_id: str, growing: Growing, size: int) -> Answer | None:
        """The error in place of a result of ``size`` bytes, if its owner has no room for it."""
        if self._files.room(growing.owner) >= size:
            return None
        message = "your files together would be larger than the limit: delete some"
        return Answer.none(custom_id, "storage_limit_exceeded", message)

    def _finish(self, batch: Batch, index: LineIndex, results: Results, growing: Growing) -> None:
        now = self._batches.get(batch.id, None)
        if now.status == "in_progress":
            for custom_id in index.custom_ids:
                if custom_id not in results.done:
                    results.add(custom_id, Answer.none(custom_id, EXPIRED, _EXPIRED_MESSAGE))
            self._batches.move(batch, "finalizing", since=("in_progress",))
        self._publish(batch, results)
        growing.bytes = 0
        counts = {"completed": results.completed, "failed": results.failed}
        # Whoever cancels it meanwhile has come too late.
        end: Status = "expired" if results.expired else "completed"
        if not self._batches.move(batch, end, since=("finalizing",), **counts):
            end = "cancelled"
            self._batches.move(batch, end, since=("cancelling",), **counts)
        shutil.rmtree(self._folder / batch.id, ignore_errors=True)
        logger.info(LogEvent("batch", {"batch": batch.id, "status": end, **counts}))

    def _publish(self, batch: Batch, results: Results) -> None:
        """Make files of the results, unless an earlier server has."""
        batch = self._batches.get(batch.id, None)
        kinds = (
            ("output_file", batch.output_file, results.output),
            ("error_file", batch.error_file, results.errors),
        )
        for column, known, path in kinds:
            if known is None and path.stat().st_size:
                self._files.take(
                    path,
                    filename=f"{batch.id}_{column.removesuffix('_file')}.jsonl",
                    purpose=OUTPUT_PURPOSE,
                    owner=batch.owner,
                    note=partial(note_file, batch=batch, column=column),
                )

    def _fail(self, batch: Batch, errors: list[dict[str, Any]]) -> None:
        """End a batch by errors; what has a result already keeps it."""
        errors = [{"line": None, "param": None, **error} for error in errors]
        results = Results.in_folder(self._folder / batch.id)
        self._publish(batch, results)
        counts = {"completed": results.completed, "failed": results.failed}
        self._batches.move(batch, "failed", since=UNFINISHED, errors=errors, **counts)
        shutil.rmtree(self._folder / batch.id, ignore_errors=True)
        fields = {"batch": batch.id, "status": "failed", "error": errors[0]["message"]}
        logger.warning(LogEvent("batch", fields))
