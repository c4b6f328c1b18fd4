"""Events of responses made in the background, for clients that come back to their streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

_MOST_BYTES = 64 << 20  # of all logs together; those that ended first give way


class EventLog:
    """The events of one response so far, as they are sent.

    ended: whether there will be no more.
    bytes: of all events.
    """

    def __init__(self) -> None:
        self.ended = False
        self.bytes = 0
        self._events: list[bytes] = []
        self._news = asyncio.Event()

    def add(self, event: bytes) -> None:
        self._events.append(event)
        self.bytes += len(event)
        self._tell()

    def end(self) -> None:
        self.ended = True
        self._tell()

    async def after(self, number: int) -> AsyncGenerator[bytes]:
        """The events behind so many, those to come too, until the response has ended."""
        while True:
            news = self._news
            while number < len(self._events):
                yield self._events[number]
                number += 1
            if self.ended:
                return
            if news is self._news:
                await news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class EventLogs:
    """Logs by the id of their response. They outlive it for as long as there is room."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most = most_bytes
        self._logs: dict[str, EventLog] = {}

    def begin(self, id: str) -> EventLog:
        log = self._logs[id] = EventLog()
        return log

    def find(self, id: str) -> EventLog | None:
        return self._logs.get(id)

    def end(self, id: str) -> None:
        """Let the log of a response end, and forget the oldest beyond the room."""
        log = self._logs.pop(id)
        log.end()
        self._logs[id] = log  # the newest of those that have ended
        total = sum(each.bytes for each in self._logs.values())
        for old, each in list(self._logs.items()):
            if total <= self._most:
                break
            if each.ended:
                total -= each.bytes
                del self._logs[old]

    def forget(self, id: str) -> None:
        self._logs.pop(id, None)
