"""Answers on the port while the model loads, and reports the progress."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from ssl import SSLContext
from typing import Any, Literal, TypeVar

from aiohttp import web
from pydantic_core import to_json
from tqdm import tqdm

from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError
from nybble.server.http.listen import BACKLOG
from nybble.server.observability.logs import LogEvent

logger = logging.getLogger(__name__)

T = TypeVar("T")
Status = Literal["loading", "warming"]

_LOG_SECONDS = 10


class Startup:
    """Progress of the start, written by the loading thread and read by the event loop.

    status: ``loading`` while the model is read and packed; ``warming`` while kernels are tuned and
        compiled.
    """

    def __init__(self, *, bars: bool) -> None:
        """bars: show progress as bars on stderr; otherwise as occasional log lines."""
        self.status: Status = "loading"
        self._bars = bars
        self._bar: tqdm[Any] | None = None
        self._since = self._logged = time.monotonic()
        self._stage: tuple[str, int, int | None] | None = None

    def report(self, what: str, done: int, total: int | None) -> None:
        """Record progress; see :data:`nybble.kernels.progress.Report`."""
        began = self._stage is None or self._stage[0] != what
        self._stage = (what, done, total)
        with suppress(OSError):  # stderr may go to a full disk
            self._show(began, what, done, total)

    def _show(self, began: bool, what: str, done: int, total: int | None) -> None:
        if self._bars:
            if self._bar is None or began:
                self.close()
                # Without a total, a count would say nothing.
                shown = "{desc} …" if total is None else None
                self._bar = tqdm(desc=what, total=total, bar_format=shown)
            self._bar.update(done - self._bar.n)
        elif began or time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            fields = {"status": self.status, "done": done, "total": total}
            logger.info(LogEvent(what[0].lower() + what[1:], fields))

    def close(self) -> None:
        """End the last bar."""
        if self._bar is not None:
            self._bar.close()

    def body(self) -> dict[str, Any]:
        """The body of ``/health``: status, seconds since the start, stage and progress.

        ``total`` is null if it is not known.
        """
        body: dict[str, Any] = {
            "status": self.status,
            "seconds": round(time.monotonic() - self._since, 1),
        }
        if self._stage is not None:
            body |= dict(zip(("stage", "done", "total"), self._stage, strict=True))
        return body


@asynccontextmanager
async def load_behind(
    sock: socket.socket, tls: SSLContext | None, startup: Startup, load: Callable[[], T]
) -> AsyncIterator[T]:
    """Run ``load`` in a thread, and meanwhile answer on ``sock`` that the server is starting.

    The context's value is what ``load`` returns. ``sock`` never stops listening: a connection made
    between this server and the next waits for the next. Earlier connections are still answered here
    while the context lasts. SIGINT and SIGTERM end the process. Raises what ``load`` raises.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _leave, number)
    runner = web.AppRunner(
        _app(startup),
        access_log=None,
        keepalive_timeout=retry_after.UNAVAILABLE,
        shutdown_timeout=1,
    )
    await runner.setup()
    try:
        listener = sock.dup()
        site = web.SockSite(runner, listener, backlog=BACKLOG, ssl_context=tls)
        await site.start()
        try:
            # In a thread of its own: threads that libraries start for it end with it.
            with ThreadPoolExecutor(1, thread_name_prefix="nybble-load") as pool:
                loaded = await loop.run_in_executor(pool, load)
        finally:
            startup.close()
        # Closing the site instead would drop connections which are accepted but not yet set up.
        loop.remove_reader(listener)
        await asyncio.sleep(0)
        await site.stop()
        yield loaded
    finally:
        await runner.cleanup()


def _app(startup: Startup) -> web.Application:
    headers = {"Retry-After": str(retry_after.UNAVAILABLE)}

    async def health(_: web.Request) -> web.Response:
        body = to_json(startup.body())
        return web.Response(status=503, body=body, content_type="application/json", headers=headers)

    async def anything(request: web.Request) -> web.Response:
        error = ApiError(
            503,
            f"the server is starting ({startup.status}): /health says how far it is",
            code="starting",
            retry_after=retry_after.UNAVAILABLE,
        )
        return error.response()

    async def close(_: web.Request, response: web.StreamResponse) -> None:
        response.force_close()  # the next request must reach the real server

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_route("*", "/{path:.*}", anything)
    app.on_response_prepare.append(close)
    return app


def _leave(number: int) -> None:
    logger.info("interrupted while starting")
    # The next start finds and removes a half-packed model, as after a kill.
    for rank in multiprocessing.active_children():
        rank.kill()  # it may be importing PyTorch, and would end only after that
    os._exit(128 + number)
