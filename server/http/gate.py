"""Accepts requests until the server shuts down, and waits for the last one to finish."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError


class Gate:
    """Counts the requests in progress; once closed it accepts no more."""

    def __init__(self) -> None:
        self.closed = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Raises ApiError 503 once closed."""
        if self.closed:
            raise ApiError(
                503,
                "the server is shutting down",
                code="shutting_down",
                retry_after=retry_after.UNAVAILABLE,
            )
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @property
    def inside(self) -> int:
        """Requests in progress."""
        return self._inside

    async def close(self, timeout: float) -> int:
        """Wait up to ``timeout`` seconds for requests to finish; returns how many have not."""
        self.closed = True
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            pass
        return self._inside
