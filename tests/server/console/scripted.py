"""The page in front of a server whose answers a test has written."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from nybble.server.console.page import Console


@dataclass
class Scripted:
    """answer: sent in pieces, seconds apart; {model} stands for the request's. thought: sent before
    it. accepted: of each piece, how many draft tokens the step accepted that begins with it; a
    piece is a token. call: name and arguments, sent behind it. key: needed, if any. asked: the
    bodies of requests, ended: how many answers were sent whole; cut: how many the client went away
    from."""

    url: str = ""
    answer: str = "Hello."
    thought: str = ""
    call: tuple[str, str] | None = None
    pause: float = 0.0
    piece: int = 7
    key: str | None = None
    error: tuple[int, str] | None = None
    metrics: str = "nybble_engine_healthy 1.0\n"
    models: tuple[tuple[str, str | None], ...] = (("base", None), ("pirate", "base"))
    usage: dict[str, Any] = field(default_factory=dict)
    accepted: tuple[int, ...] = ()
    asked: list[dict[str, Any]] = field(default_factory=list)
    whole: int = 0
    cut: int = 0

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self._models),
            web.get("/metrics", self._metrics),
            web.get("/version", self._version),
            web.post("/v1/chat/completions", self._chat),
        ]

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response(
                {"error": {"message": "a valid API key is required"}}, status=401
            )
        if self.error is not None and request.method == "POST":
            status, message = self.error
            return web.json_response({"error": {"message": message}}, status=status)
        return None

    async def _paused(self) -> None:
        begun = time.monotonic()
        while time.monotonic() < begun + self.pause:  # a test may make it shorter meanwhile
            await asyncio.sleep(min(0.05, self.pause))

    async def _models(self, request: web.Request) -> web.Response:
        data = [{"id": name, "parent": parent} for name, parent in self.models]
        return self._refusal(request) or web.json_response({"data": data})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.metrics)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "1.2.3"})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        self.asked.append(await request.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        answer = self.answer.replace("{model}", self.asked[-1]["model"])
        pieces = [answer[at : at + self.piece] for at in range(0, len(answer), self.piece)]
        try:
            if self.thought:
                await _send(response, [{"delta": {"reasoning": self.thought}}])
            for at, piece in enumerate(pieces, 1):
                await _send(response, [{"delta": {"content": piece}}], self._counts(at))
                await self._paused()
            reason = "stop"
            if self.call is not None:
                name, arguments = self.call
                half = len(arguments) // 2
                begun = {"index": 0, "id": "call_1", "function": {"name": name, "arguments": ""}}
                await _send(response, [{"delta": {"tool_calls": [begun]}}])
                for part in (arguments[:half], arguments[half:]):
                    more = {"index": 0, "function": {"arguments": part}}
                    await _send(response, [{"delta": {"tool_calls": [more]}}])
                reason = "tool_calls"
            await _send(response, [{"delta": {}, "finish_reason": reason}])
            counts = self._counts(len(pieces)) or {"completion_tokens": len(pieces)}
            await _send(response, [], {**counts, **self.usage})
            await response.write(b"data: [DONE]\n\n")
            self.whole += 1
        except (ConnectionError, asyncio.CancelledError):
            self.cut += 1
            raise
        return response

    def _counts(self, tokens: int) -> dict[str, Any] | None:
        """The usage so far, as a server with drafts counts it."""
        if not self.accepted:
            return None
        accepted = sum(self.accepted[:tokens])
        details = {"draft_tokens": accepted + 1, "accepted_draft_tokens": accepted}
        return {"completion_tokens": tokens, "draft_tokens_details": details}


async def _send(
    response: web.StreamResponse, choices: list[dict[str, Any]], usage: Any = None
) -> None:
    event = {"choices": choices, "usage": usage}
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@contextmanager
def serving(scripted: Scripted) -> Iterator[Scripted]:
    """Serve it and the page from a thread."""
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.add_routes([*scripted.routes(), *Console().routes()])
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        scripted.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield scripted
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
