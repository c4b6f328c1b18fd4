"""``/v1/fine_tuning/jobs``: create, list, retrieve, cancel; their events and checkpoints."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Any

from aiohttp import web

from nybble.finetune.train import packs
from nybble.models import Architecture
from nybble.server.api.parse import read_body
from nybble.server.api.respond import json_response
from nybble.server.files.access import Access, Caller
from nybble.server.files.files import Files
from nybble.server.files.paging import Page
from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError
from nybble.server.tenancy.tenants import Tenant
from nybble.server.training.jobs import UNFINISHED, Job, JobEvent, Jobs
from nybble.server.training.plan import plan_of
from nybble.server.training.runner import Runner
from nybble.server.training.schema import CreateJob
from nybble.server.training.settings import TrainingSettings

JOBS = "/v1/fine_tuning/jobs"
# The most unfinished jobs of one owner: all share one queue, and only one job runs at a time.
_MAX_UNFINISHED = 20
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_ID_LETTERS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_PART_LENGTH = 60  # so that the whole is a name which adapters may have
_OPERATORS_NAME = "nybble"  # in place of the organization, if there is no tenant


class JobRoutes:
    def __init__(
        self,
        jobs: Jobs,
        files: Files,
        runner: Runner,
        access: Access,
        models: tuple[str, ...],
        settings: TrainingSettings,
        architecture: Architecture,
    ) -> None:
        """Set the routes' parts.

        models: the names of the base model.
        architecture: the base model's.
        """
        self._jobs = jobs
        self._files = files
        self._runner = runner
        self._access = access
        self._models = models
        self._settings = settings
        self._architecture = architecture

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(JOBS, self.create),
            web.get(JOBS, self.list),
            web.get(JOBS + "/{id}", self.retrieve),
            web.post(JOBS + "/{id}/cancel", self.cancel),
            web.get(JOBS + "/{id}/events", self.events),
            web.get(JOBS + "/{id}/checkpoints", self.checkpoints),
        ]

    async def create(self, request: web.Request) -> web.Response:
        caller = self._access.trainer(request)
        body = await read_body(request, CreateJob)
        job = await asyncio.to_thread(self._create, body, caller)
        self._runner.wake()
        return json_response(_body(job))

    def _create(self, body: CreateJob, caller: Caller) -> Job:
        tenant = caller.tenant
        known = [name for name in self._models if tenant is None or tenant.may_use_model(name)]
        if body.model not in known:
            raise ApiError(
                404,
                f"the model {body.model!r} cannot be fine-tuned here, only "
                f"{', '.join(known) or 'none'}",
                param="model",
                code="model_not_found",
            )
        examples = self._examples(body.training_file, "training_file", caller)
        if body.validation_file is not None:
            self._examples(body.validation_file, "validation_file", caller)
        rank, most = body.nybble.rank, self._settings.max_rank
        if rank > most:
            raise ApiError(
                400,
                f"rank is {rank}, this server serves adapters up to --max-lora-rank {most}",
                param="nybble.rank",
                code="invalid_value",
            )
        for target in body.nybble.target_modules or ():
            if target not in self._architecture.linear_leaves:
                raise ApiError(
                    400,
                    f"target_modules has {target!r}, which is not a linear layer of the model that "
                    f"every token passes; there are {', '.join(self._architecture.linear_leaves)}",
                    param="nybble.target_modules",
                    code="invalid_value",
                )
        owner = caller.owner
        unfinished = self._jobs.with_status(*UNFINISHED)
        if sum(job.owner == owner for job in unfinished) >= _MAX_UNFINISHED:
            raise ApiError(
                429,
                f"{_MAX_UNFINISHED} of your fine-tuning jobs are not finished yet",
                code="too_many_jobs",
                retry_after=retry_after.JOBS_UNFINISHED,
            )
        try:
            packs(self._architecture, body.nybble.packing)
            plan = plan_of(body, examples).stored()
        except ValueError as error:
            raise ApiError(400, str(error), param="nybble", code="invalid_value") from None
        plan["model"] = self._model_name(body, tenant)
        return self._jobs.create(owner, body.kept(), plan)

    def _examples(self, id: str, param: str, caller: Caller) -> int:
        file = self._files.find(id, caller.sees)
        if file is None:
            raise ApiError(404, f"there is no file {id!r}", param=param, code="not_found")
        if file.purpose != "fine-tune":
            raise ApiError(
                400,
                f"the file's purpose is {file.purpose!r}, expected 'fine-tune'",
                param=param,
                code="invalid_value",
            )
        return file.examples

    def _model_name(self, body: CreateJob, tenant: Tenant | None) -> str:
        base = body.model.rstrip("/").rpartition("/")[2]
        owner = _OPERATORS_NAME if tenant is None else tenant.name
        parts = [
            _NOT_IN_NAMES.sub("-", part)[:_PART_LENGTH] for part in (base, owner, body.suffix or "")
        ]
        id = "".join(secrets.choice(_ID_LETTERS) for _ in range(8))
        return ":".join(["ft", *parts, id])

    async def list(self, request: web.Request) -> web.Response:
        owner = self._access.trainer(request).sees
        page = Page.of(request, default=20, most=100)
        jobs = await asyncio.to_thread(self._jobs.page, owner, page)
        return json_response(page.body(jobs, _body))

    async def retrieve(self, request: web.Request) -> web.Response:
        return json_response(_body(await self._job(request)))

    async def cancel(self, request: web.Request) -> web.Response:
        job = await self._job(request)
        if not self._runner.cancel(job):
            job = await self._job(request)
            raise ApiError(
                400,
                f"the job is {job.status} already",
                param="fine_tuning_job_id",
                code="invalid_value",
            )
        return json_response(_body(await self._job(request)))

    async def events(self, request: web.Request) -> web.Response:
        job = await self._job(request)
        page = Page.of(request, default=20, most=1000)
        events = await asyncio.to_thread(self._jobs.events, job, page)
        return json_response(page.body(events, JobEvent.body))

    async def checkpoints(self, request: web.Request) -> web.Response:
        """The only checkpoint: the served adapter, from the step with the lowest loss."""
        job = await self._job(request)
        page = Page.of(request, default=10, most=100)
        found = [job] if job.model is not None and job.best is not None else []
        return json_response(page.body(found, _checkpoint))

    async def _job(self, request: web.Request) -> Job:
        owner = self._access.trainer(request).sees
        return await asyncio.to_thread(self._jobs.get, request.match_info["id"], owner)


def _body(job: Job) -> dict[str, Any]:
    hyperparameters = job.plan["hyperparameters"]
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": job.request["model"],
        "created_at": job.created,
        "finished_at": job.finished,
        "estimated_finish": _estimated_finish(job),
        "fine_tuned_model": job.model,
        "organization_id": job.owner or _OPERATORS_NAME,
        "result_files": [] if job.result_file is None else [job.result_file],
        "status": job.status,
        "training_file": job.request["training_file"],
        "validation_file": job.request.get("validation_file"),
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "trained_tokens": job.tokens if job.status == "succeeded" else None,
        "error": job.error,
        "seed": job.plan["seed"],
        "metadata": job.request.get("metadata"),
        "integrations": [],
        "nybble": job.plan["settings"],
    }


def _estimated_finish(job: Job) -> int | None:
    """By the mean time of its steps so far."""
    if job.status != "running" or job.started is None or not job.step:
        return None
    now = time.time()
    return int(now + (now - job.started) / job.step * (job.steps - job.step))


def _checkpoint(job: Job) -> dict[str, Any]:
    assert job.best is not None
    return {
        "id": job.id.replace("ftjob-", "ftckpt-"),
        "object": "fine_tuning.job.checkpoint",
        "created_at": job.finished,
        "fine_tuned_model_checkpoint": job.model,
        "fine_tuning_job_id": job.id,
        "step_number": job.best["step"],
        "metrics": {**job.best, "full_valid_loss": job.best["valid_loss"]},
    }
