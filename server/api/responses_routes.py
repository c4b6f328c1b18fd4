"""The handlers of /v1/responses: new responses, stored ones, and those made in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from aiohttp import web

from nybble.engine import RequestOutput
from nybble.server.api.call import Call
from nybble.server.api.endpoints import Endpoints, unknown_response
from nybble.server.api.generation import Generation, SequenceGroup, Usage
from nybble.server.api.parse import read_body
from nybble.server.api.respond import json_response, respond
from nybble.server.api.response_store import ResponseStore, StoredResponse, failed
from nybble.server.api.responses import ResponsesFormatter
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.http.errors import ApiError
from nybble.server.http.gate import Gate
from nybble.server.observability.request_record import RECORD, RequestRecord


class ResponsesApi:
    """Handlers over one engine."""

    def __init__(
        self,
        endpoints: Endpoints,
        generation: Generation,
        gate: Gate,
        store: ResponseStore | None,
    ) -> None:
        """store: where responses are kept; None if they are not."""
        self._endpoints = endpoints
        self._generation = generation
        self._gate = gate
        self._store = store
        # Those being made in the background, with their states so far.
        self._running: dict[str, tuple[asyncio.Task[None], StoredResponse]] = {}

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/responses", self.create),
            web.get("/v1/responses/{id}", self.retrieve),
            web.delete("/v1/responses/{id}", self.delete),
            web.get("/v1/responses/{id}/input_items", self.input_items),
            web.post("/v1/responses/{id}/cancel", self.cancel),
        ]

    async def lifespan(self, _: web.Application) -> AsyncGenerator[None]:
        """Ends what runs in the background when the server does, and closes the store."""
        yield
        tasks = [task for task, _ in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, ResponsesRequest)
        kept = self._store is not None and body.store is not False
        if body.background and (body.stream or not kept):
            raise ApiError(
                400,
                "background is not supported with stream: ask for the response by its id"
                if body.stream
                else "background needs store, and a server with --response-store",
                param="background",
                code="unsupported_parameter",
            )
        group, formatter, stored = await self._endpoints.response(body, Call.of(request))
        if body.background:
            return self._in_background(request, group, formatter, stored)
        return await respond(request, self._generation, group, formatter, stream=bool(body.stream))

    async def retrieve(self, request: web.Request) -> web.Response:
        if request.query.get("stream", "false").lower() not in ("false", "0"):
            raise ApiError(
                400,
                "a stored response is not streamed: ask without stream",
                param="stream",
                code="unsupported_parameter",
            )
        return json_response((await self._found(request)).response)

    async def delete(self, request: web.Request) -> web.Response:
        stored = await self._found(request)
        if stored.id in self._running:
            await self._stop(stored.id)
        assert self._store is not None
        await self._store.delete(stored.id, stored.owner)
        return json_response({"id": stored.id, "object": "response", "deleted": True})

    async def input_items(self, request: web.Request) -> web.Response:
        stored = await self._found(request)
        items = [{"id": f"item_{at}", **_in_parts(item)} for at, item in enumerate(stored.items)]
        if request.query.get("order", "desc") != "asc":
            items.reverse()
        return json_response(
            {
                "object": "list",
                "data": items,
                "first_id": items[0]["id"] if items else None,
                "last_id": items[-1]["id"] if items else None,
                "has_more": False,
            }
        )

    async def cancel(self, request: web.Request) -> web.Response:
        stored = await self._found(request)
        if not stored.response["background"]:
            raise ApiError(
                400,
                f"the response {stored.id!r} was not made in the background, and only such "
                "responses can be cancelled",
                param="id",
                code="invalid_value",
            )
        if stored.id in self._running:
            await self._stop(stored.id)
        return json_response((await self._found(request)).response)

    async def _found(self, request: web.Request) -> StoredResponse:
        """The response that the path names. Raises ApiError 404."""
        id, owner = request.match_info["id"], Call.of(request).owner
        if id in self._running and self._running[id][1].owner == owner:
            return self._running[id][1]
        stored = None if self._store is None else await self._store.get(id, owner)
        if stored is None:
            raise unknown_response(id, "id")
        return stored

    def _in_background(
        self,
        request: web.Request,
        group: SequenceGroup,
        formatter: ResponsesFormatter,
        stored: StoredResponse,
    ) -> web.Response:
        assert self._store is not None
        self._store.save(stored)
        record = request[RECORD]
        task = asyncio.create_task(self._run(record, group, formatter, stored))
        self._running[group.id] = task, stored
        return json_response(stored.response)

    async def _run(
        self,
        record: RequestRecord,
        group: SequenceGroup,
        formatter: ResponsesFormatter,
        stored: StoredResponse,
    ) -> None:
        """Make a response, whose every end is saved."""
        assert self._store is not None
        usage = record.usage = Usage(group)
        outputs: list[RequestOutput] = []
        try:
            with self._gate.passed():
                async with (
                    asyncio.timeout(group.timeout),
                    aclosing(self._generation.run(group)) as results,
                ):
                    async for index, output in results:
                        if not outputs:
                            self._begun(group.id)
                        usage.add(index, output)
                        outputs.append(output)
            formatter.whole([outputs], usage)
        except asyncio.CancelledError:
            self._store.save(replace(stored, response=stored.response | {"status": "cancelled"}))
            raise
        except TimeoutError:
            reason = failed("the response's timeout has passed")
            self._store.save(replace(stored, response=stored.response | reason))
        except Exception as error:
            reason = failed(record.failed(error).message)
            self._store.save(replace(stored, response=stored.response | reason))
        finally:
            del self._running[group.id]

    def _begun(self, id: str) -> None:
        task, stored = self._running[id]
        begun = replace(stored, response=stored.response | {"status": "in_progress"})
        self._running[id] = task, begun

    async def _stop(self, id: str) -> None:
        task, _ = self._running[id]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _in_parts(item: dict[str, Any]) -> dict[str, Any]:
    """An item whose content is a list of parts, as OpenAI returns what was sent as a text."""
    text = item.get("content")
    if not isinstance(text, str):
        return item
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": text}
    return item | {"content": [part | {"annotations": []} if kind == "output_text" else part]}
