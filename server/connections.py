"""Closes connections on which nothing happens: clients that never finish asking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ConnectionGuard:
    """Allows a connection ``seconds`` without a request being answered on it.

    aiohttp limits the wait for a next request, but not for the rest of one whose headers have
    begun: without this a client could hold any number of connections open with a few bytes.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._answering: dict[Any, int] = {}
        self._idle_since: dict[Any, float] = {}

    def middleware(self) -> Middleware:
        """Knows which connections are being answered."""

        @web.middleware
        async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
            connection = request.protocol
            self._answering[connection] = self._answering.get(connection, 0) + 1
            try:
                return await handler(request)
            finally:
                self._answering[connection] -= 1
                if not self._answering[connection]:
                    del self._answering[connection]
                self._idle_since[connection] = time.monotonic()

        return around

    async def watch(self, server: web.Server) -> None:
        """Close idle connections of ``server`` until cancelled."""
        while True:
            await asyncio.sleep(self._seconds / 4)
            now = time.monotonic()
            # Those that have closed are forgotten, those that are new begin to count.
            self._idle_since = {
                connection: self._idle_since.get(connection, now)
                for connection in server.connections
            }
            for connection, since in self._idle_since.items():
                idle = now - since > self._seconds and connection not in self._answering
                if idle and connection.transport is not None:
                    connection.transport.abort()
