"""Fine-tuning as a part of the server: its routes, its queue, and the adapters it serves."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from aiohttp import web

from nybble.engine import AdapterError, Engine, ParameterError
from nybble.server.adapters.owners import AdapterOwners
from nybble.server.api.respond import json_response
from nybble.server.files.access import OPERATOR, Access
from nybble.server.files.storage import Storage
from nybble.server.http.errors import ApiError
from nybble.server.training.job_routes import JobRoutes
from nybble.server.training.jobs import UNFINISHED, Job, Jobs
from nybble.server.training.metrics import TrainingCollector
from nybble.server.training.runner import Runner
from nybble.server.training.settings import TrainingSettings

logger = logging.getLogger(__name__)


class Training:
    """Over one engine. An adapter it trained belongs to the tenant that asked for it."""

    def __init__(
        self,
        engine: Engine,
        settings: TrainingSettings,
        storage: Storage,
        *,
        base: Path,
        models: tuple[str, ...],
        owners: AdapterOwners,
        access: Access,
    ) -> None:
        """base: the folder of the model that ``engine`` serves by the names ``models``."""
        self._engine = engine
        self._owners = owners
        self._jobs, files = Jobs(storage.database), storage.files
        self._runner = Runner(
            self._jobs,
            files,
            settings,
            base,
            storage.folder / "jobs",
            models=models,
            publish=self._publish,
            withdraw=self._withdraw,
            has_template=bool(engine.tokenizer.chat_template),
        )
        self._access = access
        self._job_routes = JobRoutes(
            self._jobs,
            files,
            self._runner,
            self._access,
            models,
            settings,
            engine.architecture,
        )
        self.collector = TrainingCollector(self._jobs)

    def routes(self) -> list[web.RouteDef]:
        return [
            *self._job_routes.routes(),
            web.delete("/v1/models/{model:.+}", self.delete_model),
        ]

    async def lifespan(self, _: web.Application) -> AsyncIterator[None]:
        """Serve earlier jobs' adapters, and run jobs until the application ends."""
        await asyncio.to_thread(self._publish_all)
        running = asyncio.create_task(self._runner.run())
        yield
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    def user_of(self, file: str) -> str | None:
        """The unfinished job that uses a file, in words."""
        for job in self._jobs.with_status(*UNFINISHED):
            if file in job.files:
                return f"fine-tuning job {job.id}, which is {job.status}"
        return None

    async def delete_model(self, request: web.Request) -> web.Response:
        owner = self._access.trainer(request).sees
        name = request.match_info["model"]
        job = await asyncio.to_thread(self._jobs.by_model, name)
        if job is None or owner not in (None, job.owner):
            raise ApiError(
                404, f"there is no fine-tuned model {name!r}", param="model", code="model_not_found"
            )
        await asyncio.to_thread(self._delete_model, job, name)
        return json_response({"id": name, "object": "model", "deleted": True})

    def _delete_model(self, job: Job, name: str) -> None:
        self._jobs.forget_model(job)
        self._withdraw(name)
        shutil.rmtree(self._runner.folder(job), ignore_errors=True)

    def _publish(self, job: Job, name: str) -> None:
        """Load as ``/v1/load_lora_adapter`` does, after setting the owner: nobody else sees it."""
        if job.owner != OPERATOR:
            self._owners.set(name, job.owner)
        self._engine.load_adapter(name, str(self._runner.adapter_folder(job)))

    def _withdraw(self, name: str) -> None:
        with suppress(ParameterError):  # unloaded by an administrator
            self._engine.unload_adapter(name)
        self._owners.forget(name)

    def _publish_all(self) -> None:
        for job in self._jobs.with_status("succeeded"):
            if job.model is None:
                continue
            if not self._runner.serves_base_of(job):
                base = job.request["model"]
                logger.warning("%s is not served: it needs the base %s", job.model, base)
                continue
            try:
                self._publish(job, job.model)
            except (AdapterError, ParameterError, OSError) as error:
                logger.error("the fine-tuned model %s cannot be served: %s", job.model, error)
