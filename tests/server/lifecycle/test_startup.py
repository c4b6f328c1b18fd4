"""The hand-over from the application that answers while a model loads to the server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import ClientSession, web

from nybble.server.http.listen import BACKLOG, bind
from nybble.server.lifecycle.startup import Startup, load_behind

from ..conftest import ServerProcess

HAND_OVERS = 10
CLIENTS = 16


def listening() -> socket.socket:
    sock = bind("127.0.0.1", 0)
    sock.listen(BACKLOG)
    return sock


async def ask_until_served(url: str, note: Callable[[int], None]) -> None:
    async with ClientSession() as session:
        status = 0
        while status != 200:
            async with session.get(url) as response:
                status = response.status
                note(status)


async def hand_over() -> set[int]:
    """The statuses that clients see who ask all the time. Raises where one gets no answer."""
    sock = listening()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/health"
    statuses: list[int] = []
    busy = threading.Event()

    def note(status: int) -> None:
        statuses.append(status)
        if len(statuses) == 4 * CLIENTS:
            busy.set()

    async def served(_: web.Request) -> web.Response:
        return web.Response()

    clients = asyncio.gather(*(ask_until_served(url, note) for _ in range(CLIENTS)))
    async with load_behind(sock, None, Startup(bars=False), lambda: busy.wait(60)):
        app = web.Application()
        app.router.add_get("/health", served)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.SockSite(runner, sock).start()
        await clients
        await runner.cleanup()
    return set(statuses)


def test_whoever_asks_during_the_hand_over_is_answered_by_one_or_the_other() -> None:
    for _ in range(HAND_OVERS):
        assert asyncio.run(hand_over()) == {503, 200}


async def ask_while_it_is_accepted() -> bytes:
    """What a client gets that the loop accepts in the very turn in which loading is done.

    The loop is held until both have happened: it then learns of the end of loading first, and goes
    on from there before it has set up the connection.
    """
    sock, loop = listening(), asyncio.get_running_loop()
    held, go_on = threading.Event(), threading.Event()
    tell = loop.call_soon_threadsafe

    def hold() -> None:
        held.set()
        assert go_on.wait(60)

    def told(*call: Any, **options: Any) -> asyncio.Handle:
        handle = tell(*call, **options)
        if held.is_set():  # that loading is done
            go_on.set()
        return handle

    def load() -> socket.socket:
        tell(hold)
        assert held.wait(60)
        return socket.create_connection(sock.getsockname(), timeout=60)

    loop.call_soon_threadsafe = told  # type: ignore[method-assign]
    async with load_behind(sock, None, Startup(bars=False), load) as client:
        with client:
            await asyncio.to_thread(
                client.sendall, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            answer = await asyncio.to_thread(client.recv, 1 << 16)
    sock.close()
    return answer


def test_a_connection_that_is_accepted_as_loading_ends_is_answered() -> None:
    assert asyncio.run(ask_while_it_is_accepted()).startswith(b"HTTP/1.1 503 ")


async def ask_late() -> bytes:
    sock = listening()
    connected = threading.Event()

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        streams = await asyncio.open_connection(*sock.getsockname())
        await asyncio.sleep(0.1)  # until it is accepted
        connected.set()
        return streams

    connecting = asyncio.create_task(connect())
    async with load_behind(sock, None, Startup(bars=False), lambda: connected.wait(60)):
        reader, writer = await connecting
        await asyncio.sleep(0.1)  # well after the hand-over
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 60)  # to the end: it closes the connection
        writer.close()
    sock.close()
    return answer


def test_who_connected_before_the_hand_over_is_answered_after_it() -> None:
    answer = asyncio.run(ask_late())
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: " in answer


def test_a_log_file_has_no_progress_bars(server: ServerProcess) -> None:
    """Its stderr is no terminal: a stage is a line, not one for each step on its way."""
    shown = [line for line in server.lines if "%|" in line or "/s]" in line or "it/s" in line]
    assert not shown
    stages = [line for line in server.lines if "oading weights" in line]
    assert len(stages) == 1
