"""Writes a group's outputs as one JSON body or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    aclosing,
    asynccontextmanager,
    nullcontext,
)
from typing import Any, Protocol, TypeVar

from aiohttp import web
from pydantic_core import to_json

from nybble.engine import RequestOutput
from nybble.server.api.generation import Generation, SequenceGroup, Usage
from nybble.server.api.running import RUNNING, RunningRequest
from nybble.server.http.errors import ApiError
from nybble.server.observability.request_record import RECORD, RequestRecord
from nybble.server.replicas.last_words import LAST_WORDS

# A client that reads nothing for this long while its buffers are full is disconnected.
_STALL_SECONDS = 60

T = TypeVar("T")

Results = AsyncGenerator[tuple[int, RequestOutput]]
ServerSentEvent = tuple[
    str | None, dict[str, Any]
]  # of a server-sent event: name or None, and data


class WholeFormatter(Protocol):
    """How an endpoint writes a group's outputs as one body."""

    def whole(self, outputs: Sequence[Sequence[RequestOutput]], usage: Usage) -> dict[str, Any]:
        """The body, from all outputs of every sequence."""
        ...


class Formatter(WholeFormatter, Protocol):
    """How an endpoint writes a group's outputs, as one body or as a stream."""

    # The data that ends a stream, after the last event.
    terminator: bytes | None

    def events(self, index: int, output: RequestOutput, usage: Usage) -> Sequence[ServerSentEvent]:
        """The events for one output of a sequence; called for its outputs in order.

        usage: of this output and all before it.
        """
        ...

    def last_events(self, usage: Usage) -> Sequence[ServerSentEvent]:
        """The events once all sequences are finished."""
        ...

    def failure(self, error: ApiError) -> ServerSentEvent:
        """The event that ends a stream after an error."""
        ...

    def lost(self, error: ApiError) -> ServerSentEvent:
        """The event that ends a stream whose server is gone; made before, it changes nothing."""
        ...


async def respond(
    request: web.Request,
    generation: Generation,
    group: SequenceGroup,
    formatter: Formatter,
    *,
    stream: bool,
) -> web.StreamResponse:
    """Run ``group`` and send its outputs. If the response ends early, its sequences are cancelled.

    Raises ApiError 504 if its timeout passes before the first byte is sent, ApiError 499 if it is
    cancelled until then, and what Generation.run raises.
    """
    if not stream:
        return await respond_whole(request, generation, group, formatter)
    usage = request[RECORD].usage = Usage(group)
    with _running(request, group) as running:
        async with aclosing(generation.run(group)) as results:
            return await _stream(request, results, usage, formatter, running)


async def respond_whole(
    request: web.Request, generation: Generation, group: SequenceGroup, formatter: WholeFormatter
) -> web.Response:
    """Run ``group`` to its end and send one body. Raises what :func:`respond` does."""
    with _running(request, group) as running:
        body = await whole_body(generation, group, formatter, request[RECORD], running.limited())
        return web.Response(body=body, content_type="application/json")


async def whole_body(
    generation: Generation,
    group: SequenceGroup,
    formatter: WholeFormatter,
    record: RequestRecord,
    limited: AbstractAsyncContextManager[None],
) -> bytes:
    """Run ``group`` to its end and return its body as JSON.

    limited: the time that running it may take.
    """
    usage = record.usage = Usage(group)
    outputs: list[list[RequestOutput]] = [[] for _ in range(group.size)]
    async with aclosing(generation.run(group)) as results, limited:
        async for index, output in results:
            usage.add(index, output)
            outputs[index].append(output)
    return await _written(outputs[0][0], lambda: to_json(formatter.whole(outputs, usage)))


async def _stream(
    request: web.Request,
    results: Results,
    usage: Usage,
    formatter: Formatter,
    running: RunningRequest,
) -> web.StreamResponse:
    # Wait for the first output before sending headers: a failure until then gets its own status.
    async with running.limited():
        first = await anext(results)
    stream = EventStream(request)

    async def tell(index: int, output: RequestOutput) -> None:
        usage.add(index, output)
        for event in await _written(output, lambda: formatter.events(index, output, usage)):
            await stream.send(event)

    async with stream.opened(formatter.lost(killed())):
        try:
            async with running.limited():
                await tell(*first)
                async for index, output in results:
                    await tell(index, output)
            for event in formatter.last_events(usage):
                await stream.send(event)
            if formatter.terminator is not None:
                await stream.write(b"data: " + formatter.terminator + b"\n\n")
        except ConnectionError:
            raise
        except Exception as error:
            # The status 200 has been sent already, so the error is sent as an event.
            await stream.send(formatter.failure(request[RECORD].failed(error)))
    return stream.response


def killed() -> ApiError:
    """What the keeper of last words tells a client."""
    return ApiError(
        500,
        "the server was killed during this answer: send the request again",
        code="engine_failed",
    )


async def _written(output: RequestOutput, write: Callable[[], T]) -> T:
    """Run ``write``, in another thread if the output is large enough to block the event loop."""
    much = output.prompt_logprobs is not None or output.embedding is not None
    return await asyncio.to_thread(write) if much else write()


def _running(request: web.Request, group: SequenceGroup) -> AbstractContextManager[RunningRequest]:
    owner = "" if group.tenant is None else group.tenant.name
    ids = (request[RECORD].id, group.id)
    return request.app[RUNNING].entered(ids, owner, group.timeout)


class EventStream:
    """Sends server-sent events to one client, no faster than it reads."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )

    @asynccontextmanager
    async def opened(self, lost: ServerSentEvent) -> AsyncIterator[None]:
        """Send the head before what is inside, and the end after it, if nothing is raised.

        lost: what the client gets if the process is killed inside, by the one beside it.
        """
        words = self._request.app.get(LAST_WORDS)
        with nullcontext() if words is None else words.held(self._request, event_bytes(lost)):
            await self.response.prepare(self._request)
            yield
            await self.response.write_eof()

    async def send(self, event: ServerSentEvent) -> None:
        await self.write(event_bytes(event))

    async def write(self, data: bytes) -> None:
        """Raises ConnectionError if the client is gone or has stalled."""
        try:
            async with asyncio.timeout(_STALL_SECONDS):
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client stopped reading") from None


def event_bytes(event: ServerSentEvent) -> bytes:
    """An event as it is sent."""
    name, data = event
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + to_json(data) + b"\n\n"


def json_response(body: dict[str, Any]) -> web.Response:
    return web.Response(body=to_json(body), content_type="application/json")
