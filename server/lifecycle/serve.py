"""Runs an engine behind HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from aiohttp import web

from nybble.engine import Engine, EngineFailedError
from nybble.engine.conversation import template_of
from nybble.loaders.templates import TemplateFailedError, TemplateInvalidError, TemplateRenderer
from nybble.server.adapters.watch import AdapterWatch
from nybble.server.app import make_app
from nybble.server.http.gate import Gate
from nybble.server.http.listen import BACKLOG
from nybble.server.lifecycle.settings import ServerSettings
from nybble.server.replicas.last_words import LAST_WORDS, LastWords

logger = logging.getLogger(__name__)

# How long a connection may stay without a request, or with incomplete headers.
_KEEPALIVE_SECONDS = 75
# Time to send the last bytes of responses once everything is computed.
_FLUSH_SECONDS = 5
# The same after a failure, when every client has been told: for requests, and for connections. A
# client that reads nothing does not keep a supervisor waiting.
_FAILED_SECONDS = 1.0


async def serve(
    engine: Engine,
    sock: socket.socket,
    settings: ServerSettings,
    *,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve a started engine until SIGINT or SIGTERM, then let requests in flight finish.

    Meanwhile new requests get 503. Requests that do not finish in time end with an error. A second
    signal ends them with an error now, and then the process.

    ready: called when requests are accepted.

    Raises EngineFailedError, after answering every client, if the engine has failed for good.
    """
    gate = Gate()
    templates = TemplateRenderer()
    app = make_app(engine, settings, gate, templates)
    if (words := LastWords.of_this_process()) is not None:
        app[LAST_WORDS] = words
    templates.start()
    _try_template(engine, templates, gate)
    # A disconnected client's handler must be cancelled: that cancels its sequences.
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=_KEEPALIVE_SECONDS,
        shutdown_timeout=_FLUSH_SECONDS,
    )
    await runner.setup()
    ending = _Ending(engine, gate, templates)
    loop = asyncio.get_running_loop()
    engine.when_dead(lambda: _tell(loop, ending.asked))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ending.on_signal, number)
    watch = None
    if settings.adapter_watch is not None:
        adapters = AdapterWatch(engine, settings.adapter_watch, settings.models)
        watch = asyncio.create_task(adapters.run())
    try:
        await web.SockSite(runner, sock, backlog=BACKLOG, ssl_context=settings.tls).start()
        ready()
        await ending.asked.wait()
        timeout = settings.shutdown_timeout if engine.failure is None else _FAILED_SECONDS
        logger.info(
            "shutting down: finishing requests for at most %g s; a second signal (Ctrl-C) ends "
            "them at once",
            timeout,
        )
        left = await gate.close(timeout)
        await ending.at_once()
        if left:
            logger.warning("%d requests did not finish in time and end with an error", left)
    finally:
        if watch is not None:
            watch.cancel()
        # The engine first, so that open streams get an error event; then the connections.
        await asyncio.to_thread(engine.stop)
        with suppress(TimeoutError):
            async with asyncio.timeout(None if engine.failure is None else _FAILED_SECONDS):
                await runner.cleanup()
        templates.close()
        if settings.tracing is not None:
            await asyncio.to_thread(settings.tracing.close)
    await ending.at_once()
    if engine.failure is not None:
        raise EngineFailedError(f"the engine has failed: {engine.failure}")


class _Ending:
    """What signals do: the first ends the server in order, the second at once.

    asked: whether the server is to end.
    """

    def __init__(self, engine: Engine, gate: Gate, templates: TemplateRenderer) -> None:
        self.asked = asyncio.Event()
        self._engine, self._gate, self._templates = engine, gate, templates
        self._now: asyncio.Task[None] | None = None

    def on_signal(self, number: int) -> None:
        code = 128 + number
        if not self.asked.is_set():
            self.asked.set()
        elif self._now is None:
            self._now = asyncio.create_task(self._end(code))
        else:
            os._exit(code)

    async def at_once(self) -> None:
        """Does not return if a second signal has come."""
        if self._now is not None:
            await self._now

    async def _end(self, code: int) -> None:
        logger.warning("a second signal: %d requests end with an error now", self._gate.inside)
        # Should the event loop be held up.
        timer = threading.Timer(2 * _FAILED_SECONDS, os._exit, (code,))
        timer.daemon = True
        timer.start()
        self._engine.abandon()
        await self._gate.close(_FAILED_SECONDS)
        self._templates.close()  # its process would complain that this one is gone
        os._exit(code)


def _try_template(engine: Engine, templates: TemplateRenderer, gate: Gate) -> None:
    """Warn of a chat template that no chat can use; other requests do without it.

    A template may well refuse this one message, so only what is wrong with any message is told.
    """

    def tell(future: Future[str]) -> None:
        error = future.exception()
        if isinstance(error, TemplateInvalidError | TemplateFailedError) and not gate.closed:
            logger.warning("the model's chat template cannot be used: %s", error)

    try:
        template = template_of(engine.tokenizer, tools=False)
    except ValueError as error:
        logger.warning("the model's chat template cannot be used: %s", error)
        return
    if template is not None:
        message = {"role": "user", "content": "x"}
        templates.submit(template, [message], None, {}).add_done_callback(tell)


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)
