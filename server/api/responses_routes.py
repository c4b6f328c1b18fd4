"""The handlers of /v1/responses: new responses, stored ones, and those made in the background."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from nybble.server.api.call import Call
from nybble.server.api.endpoints import Endpoints, unknown_response
from nybble.server.api.event_log import EventLog, EventLogs
from nybble.server.api.generation import Generation, SequenceGroup, Usage
from nybble.server.api.parse import read_body
from nybble.server.api.respond import (
    EventStream,
    ServerSentEvent,
    event_bytes,
    json_response,
    killed,
    respond,
)
from nybble.server.api.response_store import ResponseStore, StoredResponse
from nybble.server.api.responses import ResponsesFormatter
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.files.paging import Page
from nybble.server.http.errors import ApiError
from nybble.server.http.gate import Gate
from nybble.server.observability.request_record import RequestRecord

_NUMBER = re.compile(r"-1|[0-9]{1,9}")


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
        self._running: dict[str, Running] = {}
        self._logs = EventLogs()

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
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, ResponsesRequest)
        kept = self._store is not None and body.store is not False
        if body.background and not kept:
            raise ApiError(
                400,
                "background needs store, and a server with --response-store",
                param="background",
                code="unsupported_parameter",
            )
        if kept and self._store is not None:
            await self._store.ready()
        call = Call.of(request)
        group, formatter, stored = await self._endpoints.response(body, call)
        if body.background:
            log = self._logs.begin(group.id) if body.stream else None
            self._in_background(call, group, formatter, stored, log)
            return json_response(stored.response) if log is None else await _follow(request, log, 0)
        return await respond(request, self._generation, group, formatter, stream=bool(body.stream))

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        """The response, or with ``stream`` its events behind number ``starting_after``."""
        stored = await self._found(request)
        if request.query.get("stream", "false").lower() in ("false", "0"):
            return json_response(stored.response)
        log = self._logs.find(stored.id)
        if log is None:
            raise ApiError(
                400,
                "there are no events of this response: it was not made with background and stream, "
                "or is too long ago; ask without stream",
                param="stream",
                code="unsupported_parameter",
            )
        given = request.query.get("starting_after", "-1")
        if not _NUMBER.fullmatch(given):
            raise ApiError(
                400,
                f"starting_after is {given!r:.50}, expected the number of an event",
                param="starting_after",
                code="invalid_value",
            )
        return await _follow(request, log, int(given) + 1)

    async def delete(self, request: web.Request) -> web.Response:
        stored = await self._found(request)
        if stored.id in self._running:
            await self._stop(stored.id)
        assert self._store is not None
        await self._store.delete(stored.id, stored.owner)
        self._logs.forget(stored.id)
        return json_response({"id": stored.id, "object": "response", "deleted": True})

    async def input_items(self, request: web.Request) -> web.Response:
        stored = await self._found(request)
        items = [{"id": f"item_{at}", **_in_parts(item)} for at, item in enumerate(stored.items)]
        # Of what can be included there is nothing here.
        others = ("order", "include", "include[]")
        page = Page.of(request, default=20, most=100, others=others)
        if page.newest:
            items.reverse()
        if page.after is not None:
            ids = [item["id"] for item in items]
            if page.after not in ids:
                message = f"there is no item {page.after!r}"
                raise ApiError(404, message, param="after", code="not_found")
            items = items[ids.index(page.after) + 1 :]
        return json_response(page.body(items, lambda item: item))

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
        running = self._running.get(id)
        if running is not None and running.stored.owner == owner:
            return running.stored
        stored = None if self._store is None else await self._store.get(id, owner)
        if stored is None:
            raise unknown_response(id, "id")
        return stored

    def _in_background(
        self,
        call: Call,
        group: SequenceGroup,
        formatter: ResponsesFormatter,
        stored: StoredResponse,
        log: EventLog | None,
    ) -> None:
        assert self._store is not None
        self._store.save(stored)
        task = asyncio.create_task(self._run(call.record, group, formatter, stored, log))
        if call.leases is not None:  # the request ends before the response
            leases = call.leases.pop_all()
            task.add_done_callback(lambda _: leases.close())
        self._running[group.id] = Running(task, stored)

    async def _run(
        self,
        record: RequestRecord,
        group: SequenceGroup,
        formatter: ResponsesFormatter,
        stored: StoredResponse,
        log: EventLog | None,
    ) -> None:
        """Make a response, whose every end is saved."""
        assert self._store is not None
        usage = record.usage = Usage(group)

        def tell(events: Sequence[ServerSentEvent]) -> None:
            if log is not None:
                for event in events:
                    log.add(event_bytes(event))

        try:
            with self._gate.passed():
                async with (
                    asyncio.timeout(group.timeout),
                    aclosing(self._generation.run(group)) as results,
                ):
                    async for index, output in results:
                        self._running[group.id].begin()
                        usage.add(index, output)
                        tell(formatter.events(index, output, usage))
            tell(formatter.last_events(usage))
        except asyncio.CancelledError:
            self._store.save(replace(stored, response=stored.response | {"status": "cancelled"}))
            raise
        except TimeoutError:
            late = ApiError(504, "the response's timeout has passed", code="timeout")
            tell([formatter.failure(late)])
        except Exception as error:
            tell([formatter.failure(record.failed(error))])
        finally:
            del self._running[group.id]
            if log is not None:
                self._logs.end(group.id)

    async def _stop(self, id: str) -> None:
        task = self._running[id].task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass
class Running:
    """A response being made in the background. stored: its state so far."""

    task: asyncio.Task[None]
    stored: StoredResponse

    def begin(self) -> None:
        """Its first tokens are there."""
        if self.stored.response["status"] == "queued":
            response = self.stored.response | {"status": "in_progress"}
            self.stored = replace(self.stored, response=response)


async def _follow(request: web.Request, log: EventLog, start: int) -> web.StreamResponse:
    """Send events as they come. The response is made whether or not anybody follows."""
    stream = EventStream(request)
    lost = ResponsesFormatter.lost(killed())
    async with stream.opened(lost), aclosing(log.after(start)) as events:
        async for event in events:
            await stream.write(event)
    return stream.response


def _in_parts(item: dict[str, Any]) -> dict[str, Any]:
    """An item whose content is a list of parts, as OpenAI returns what was sent as a text."""
    text = item.get("content")
    if not isinstance(text, str):
        return item
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": text}
    return item | {"content": [part | {"annotations": []} if kind == "output_text" else part]}
