"""``/v1/batches``: create, list, retrieve, cancel."""

from __future__ import annotations

import asyncio

from aiohttp import web

from nybble.server.api.parse import read_body
from nybble.server.api.respond import json_response
from nybble.server.batches.batches import PURPOSE, Batch, Batches, Status
from nybble.server.batches.runner import Runner
from nybble.server.batches.schema import CreateBatch
from nybble.server.files.access import Access, Caller
from nybble.server.files.files import Files
from nybble.server.files.paging import Page
from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError

BATCHES = "/v1/batches"
_MAX_UNFINISHED = 100  # of one owner


class BatchRoutes:
    def __init__(self, batches: Batches, files: Files, runner: Runner, access: Access) -> None:
        self._batches = batches
        self._files = files
        self._runner = runner
        self._access = access

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(BATCHES, self.create),
            web.get(BATCHES, self.list),
            web.get(BATCHES + "/{id}", self.retrieve),
            web.post(BATCHES + "/{id}/cancel", self.cancel),
        ]

    async def create(self, request: web.Request) -> web.Response:
        caller = self._access.caller(request)
        body = await read_body(request, CreateBatch)
        batch = await asyncio.to_thread(self._create, body, caller)
        self._runner.wake()
        return json_response(batch.body())

    def _create(self, body: CreateBatch, caller: Caller) -> Batch:
        file = self._files.find(body.input_file_id, caller.sees)
        if file is None:
            message = f"there is no file {body.input_file_id!r}"
            raise ApiError(404, message, param="input_file_id", code="not_found")
        if file.purpose != PURPOSE:
            raise ApiError(
                400,
                f"the file's purpose is {file.purpose!r}, expected {PURPOSE!r}",
                param="input_file_id",
                code="invalid_value",
            )
        unfinished = self._batches.unfinished()
        if sum(batch.owner == caller.owner for batch in unfinished) >= _MAX_UNFINISHED:
            raise ApiError(
                429,
                f"{_MAX_UNFINISHED} of your batches are not finished yet",
                code="too_many_batches",
                retry_after=retry_after.JOBS_UNFINISHED,
            )
        return self._batches.create(caller.owner, body.kept())

    async def list(self, request: web.Request) -> web.Response:
        owner = self._access.caller(request).sees
        page = Page.of(request, default=20, most=100)
        batches = await asyncio.to_thread(self._batches.page, owner, page)
        return json_response(page.body([*map(self._runner.as_it_is, batches)], Batch.body))

    async def retrieve(self, request: web.Request) -> web.Response:
        return json_response((await self._batch(request)).body())

    async def cancel(self, request: web.Request) -> web.Response:
        batch = await self._batch(request)
        began: tuple[Status, ...] = ("validating", "in_progress")
        moved = await asyncio.to_thread(self._batches.move, batch, "cancelling", since=began)
        batch = await self._batch(request)
        if moved:
            self._runner.stop(batch)
        elif batch.status != "cancelling":
            raise ApiError(
                409, f"the batch is {batch.status} already", param="batch_id", code="invalid_value"
            )
        return json_response(batch.body())

    async def _batch(self, request: web.Request) -> Batch:
        owner = self._access.caller(request).sees
        batch = await asyncio.to_thread(self._batches.get, request.match_info["id"], owner)
        return self._runner.as_it_is(batch)
