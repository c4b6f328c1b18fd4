"""Runs an engine behind HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence

from aiohttp import web
from nybble.engine import Engine
from nybble.server.app import make_app
from nybble.server.gate import Gate

logger = logging.getLogger(__name__)

_BACKLOG = 1024
# For responses whose last bytes are on the way when everything has been computed.
_FLUSH_SECONDS = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not listening yet. Raises OSError naming what was refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"--host {host!r} is not an address of this machine: {error}") from error
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
        ) from error
    return sock


async def serve(
    engine: Engine,
    sock: socket.socket,
    *,
    models: tuple[str, ...],
    max_sequences: int,
    api_keys: Sequence[str] = (),
    shutdown_timeout: float = 30,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGINT or SIGTERM, then let requests in flight finish.

    While they do, new ones get 503. Those not finished after ``shutdown_timeout`` seconds end with
    an error. A second signal ends the process at once. ``ready`` is called when requests are taken.
    """
    gate = Gate()
    app = make_app(engine, models=models, max_sequences=max_sequences, gate=gate, api_keys=api_keys)
    # Cancelling handlers of clients that have gone is what cancels their sequences.
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=_FLUSH_SECONDS
    )
    await runner.setup()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _on_signal, stopping, number)
    engine.start()
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
