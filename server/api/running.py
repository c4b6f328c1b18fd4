"""The requests being answered, by their ids, so that a client can cancel one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from nybble.server.http.errors import ApiError


class RunningRequest:
    """One request in progress.

    owner: the tenant's name; "" without tenants.
    """

    def __init__(self, owner: str, timeout: float | None) -> None:
        """timeout: seconds the request may take."""
        self.owner = owner
        now = asyncio.get_running_loop().time()
        self._deadline = None if timeout is None else now + timeout
        self._cancelled = False
        self._waiting: asyncio.Timeout | None = None

    def cancel(self) -> None:
        if not self._cancelled and self._waiting is not None:
            self._waiting.reschedule(0)
        self._cancelled = True

    @asynccontextmanager
    async def limited(self) -> AsyncGenerator[None]:
        """Raises ApiError 504 at the request's deadline, and 499 once it is cancelled."""
        try:
            async with asyncio.timeout_at(0 if self._cancelled else self._deadline) as waiting:
                self._waiting = waiting
                yield
        except TimeoutError:
            if self._cancelled:
                raise ApiError(499, "the request was cancelled", code="cancelled") from None
            raise ApiError(504, "the request's timeout has passed", code="timeout") from None
        finally:
            self._waiting = None


class RunningRequests:
    """All requests in progress of one application."""

    def __init__(self) -> None:
        self._requests: dict[str, set[RunningRequest]] = {}

    @contextmanager
    def entered(
        self, ids: Sequence[str], owner: str, timeout: float | None
    ) -> Iterator[RunningRequest]:
        """A request while it is answered. Clients choose some ids, and may use one twice."""
        request = RunningRequest(owner, timeout)
        for id in ids:
            self._requests.setdefault(id, set()).add(request)
        try:
            yield request
        finally:
            for id in ids:
                self._requests[id].discard(request)
                if not self._requests[id]:
                    del self._requests[id]

    def cancel(self, id: str, owner: str) -> int:
        """Cancel an owner's requests of this id. Returns how many there were."""
        found = [each for each in self._requests.get(id, ()) if each.owner == owner]
        for request in found:
            request.cancel()
        return len(found)


RUNNING = web.AppKey("running", RunningRequests)
