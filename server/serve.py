"""Runs an engine behind HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web
from nybble.engine import Engine
from nybble.server.app import make_app
from nybble.server.gate import Gate
from nybble.server.tenants import Tenants

logger = logging.getLogger(__name__)

_BACKLOG = 1024
# For responses whose last bytes are on the way when everything has been computed.
_FLUSH_SECONDS = 5


async def serve(
    engine: Engine,
    sock: socket.socket,
    *,
    models: tuple[str, ...],
    max_sequences: int,
    api_keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (),
    adapter_roots: Sequence[Path] = (),
    tenants: Tenants | None = None,
    shutdown_timeout: float = 30,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve a started engine until SIGINT or SIGTERM, then let requests in flight finish.

    While they do, new ones get 503. Those not finished after ``shutdown_timeout`` seconds end with
    an error. A second signal ends the process at once. ``ready`` is called when requests are taken.
    SIGHUP has the tenants read again.
    """
    gate = Gate()
    app = make_app(
        engine,
        models=models,
        max_sequences=max_sequences,
        gate=gate,
        api_keys=api_keys,
        admin_keys=admin_keys,
        adapter_roots=adapter_roots,
        tenants=tenants,
    )
    # Cancelling handlers of clients that have gone is what cancels their sequences.
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=_FLUSH_SECONDS
    )
    await runner.setup()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _on_signal, stopping, number)
    if tenants is not None:
        loop.add_signal_handler(signal.SIGHUP, tenants.reload)
    try:
        await web.SockSite(runner, sock, backlog=_BACKLOG).start()
        ready()
        await stopping.wait()
        logger.info("shutting down: finishing requests for at most %g s", shutdown_timeout)
        left = await gate.close(shutdown_timeout)
        if left:
            logger.warning("%d requests did not finish in time and end with an error", left)
    finally:
        # First the engine, so that what is still streaming is told; then the connections.
        await asyncio.to_thread(engine.stop)
        await runner.cleanup()


def _on_signal(stopping: asyncio.Event, number: int) -> None:
    if stopping.is_set():
        os._exit(128 + number)
    stopping.set()
