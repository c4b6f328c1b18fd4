"""Writes a job's outputs as one JSON body or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Protocol

from aiohttp import web
from nybble.engine import RequestOutput
from nybble.server.errors import as_api_error
from nybble.server.generation import Generation, Job, Usage
from pydantic_core import to_json

# A client that takes nothing for this long while its buffers are full is given up.
_STALL_SECONDS = 60


class Shape(Protocol):
    """How an endpoint writes sequences."""

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """The body around choices: of a whole response, or of one event."""
        ...

    def choice(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """A finished sequence."""
        ...

    def chunks(self, index: int, output: RequestOutput) -> Sequence[dict[str, Any]]:
        """What one output of a sequence adds to a stream; called for its outputs in order."""
        ...


async def respond(
    request: web.Request,
    generation: Generation,
    job: Job,
    shape: Shape,
    *,
    stream: bool,
    include_usage: bool,
) -> web.StreamResponse:
    """Run ``job``. Whatever ends the response early ends its sequences too."""
    if stream:
        return await _stream(request, generation, job, shape, include_usage)
    usage = Usage(job)
    outputs: list[list[RequestOutput]] = [[] for _ in range(job.size)]
    async with aclosing(generation.run(job)) as results:
        async for index, output in results:
            usage.add(index, output)
            outputs[index].append(output)
    choices = [shape.choice(index, sequence) for index, sequence in enumerate(outputs)]
    return json_response(shape.envelope(choices, chunk=False) | {"usage": usage.body()})


async def _stream(
    request: web.Request, generation: Generation, job: Job, shape: Shape, include_usage: bool
) -> web.StreamResponse:
    usage = Usage(job)
    # OpenAI sends a null usage with every event before the one that carries it.
    extra: dict[str, Any] = {"usage": None} if include_usage else {}
    async with aclosing(generation.run(job)) as results:
        # Before the headers, so that what cannot be served gets a status of its own.
        index, output = await anext(results)
        events = EventStream(request)
        await events.open()
        try:
            while True:
                usage.add(index, output)
                for choice in shape.chunks(index, output):
                    await events.send(shape.envelope([choice], chunk=True) | extra)
                try:
                    index, output = await anext(results)
                except StopAsyncIteration:
                    break
            if include_usage:
                await events.send(shape.envelope([], chunk=True) | {"usage": usage.body()})
            await events.done()
        except ConnectionError:
            raise
        except Exception as error:
            # The status is sent already: an event says that the stream is not whole.
            await events.send(as_api_error(error).body())
            await events.close()
    return events.response


class EventStream:
    """Server-sent events to one client, no faster than it reads."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )

    async def open(self) -> None:
        await self.response.prepare(self._request)

    async def send(self, data: dict[str, Any], event: str | None = None) -> None:
        """Raises ConnectionError where the client is gone or has stalled."""
        name = b"" if event is None else b"event: " + event.encode() + b"\n"
        await self._write(name + b"data: " + to_json(data) + b"\n\n")

    async def done(self) -> None:
        await self._write(b"data: [DONE]\n\n")
        await self.close()

    async def close(self) -> None:
        await self.response.write_eof()

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(_STALL_SECONDS):
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client stopped reading") from None


def json_response(body: dict[str, Any]) -> web.Response:
    return web.Response(body=to_json(body), content_type="application/json")
