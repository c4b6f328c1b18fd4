"""Admits the requests that can be served without waiting too long.

A request needs KV blocks for the part of its prompt that is not in the prefix cache, and for its
output, whose length is estimated. If all requests in flight need more tokens than can be computed
at once, the excess waits until that many tokens have been computed. The wait is predicted from the
rate measured while there was a queue. (vLLM bounds queued requests and queued tokens, and the
operator derives the second from the acceptable wait; here the rate is measured.)

The scheduler serves tenants by weight, so a tenant's wait is predicted from its own queue and its
share of the rate. A tenant that floods the server waits only for itself, and a tenant with nothing
in flight is admitted. A bound on the number of sequences applies as well.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError
from nybble.server.tenancy.tenants import Tenant

Clock = Callable[[], float]

_MEMORY_SECONDS = 60.0  # after this, an observed rate's weight falls to a third
_MIN_SECONDS = 1.0  # of a queue, before its rate is used
_MEMORY_SEQUENCES = 200
_FIRST_GUESS = 256.0  # mean output in tokens, before any is observed


@dataclass(frozen=True)
class Capacity:
    """What the server has room for.

    sequences: most sequences in flight.
    seats: most sequences computed at once.
    tokens: tokens of sequences of a given mean length that can be in the KV cache at once. With
        sliding windows a long sequence keeps only a part of its tokens there.
    max_wait: seconds a sequence may wait before it is computed.
    """

    sequences: int
    seats: int
    tokens: Callable[[float], float]
    max_wait: float


class Needs:
    """Estimates a sequence's KV cache from past sequences.

    Some outputs end by themselves. Others are cut off at a limit, and would have been longer. So
    the mean length without limits is estimated as all tokens divided by the outputs that ended by
    themselves (the estimate for censored lifetimes with a constant hazard).
    """

    def __init__(self) -> None:
        self._outputs, self._ends = _FIRST_GUESS, 1.0
        self._prompts = self._cached = 0.0

    def add(self, prompt: int, cached: int, output: int, *, ended: bool) -> None:
        """Record a finished sequence's tokens.

        ended: whether it ended by itself, rather than at a limit or by cancellation.
        """
        keep = 1 - 1 / _MEMORY_SEQUENCES
        self._outputs = self._outputs * keep + output
        self._ends = self._ends * keep + ended
        self._prompts = self._prompts * keep + prompt
        self._cached = self._cached * keep + cached

    def of_prompt(self, tokens: int) -> float:
        """Expected tokens of a prompt that are not in the prefix cache."""
        return tokens * (1 - self._cached / max(self._prompts, 1.0))

    def of_output(self, limit: int) -> float:
        """Expected tokens of an output that is cut off at ``limit``."""
        mean = self._outputs / max(self._ends, 1e-9)
        return mean * -math.expm1(-limit / mean) if limit else 0.0


class Admission:
    """Counts sequences in flight by tenant, and refuses requests that would wait too long.

    computed: returns how many tokens, of prompts and outputs, the engine has computed so far.
    """

    def __init__(
        self, capacity: Capacity, computed: Callable[[], int], clock: Clock = time.monotonic
    ) -> None:
        self.needs = Needs()
        self.capacity = capacity
        self._computed = computed
        self._clock = clock
        self._sequences: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._weights: dict[str, float] = {}
        # Seconds with a queue and tokens computed in them, both with exponential decay.
        self._seconds = self._work = 0.0
        self._seen = (clock(), computed())
        self._in_background = 0
        self._turn = asyncio.Lock()  # which is first come, first served
        self._freed = asyncio.Event()  # set when sequences have ended

    @property
    def rate(self) -> float | None:
        """Tokens computed a second while there is a queue; None if there was no queue yet."""
        return self._work / self._seconds if self._seconds >= _MIN_SECONDS else None

    @property
    def predicted_wait(self) -> float:
        """Seconds until all that is in flight could be computed at once; 0 if unknown."""
        queued = self._tokens.total() - self._at_once(0, 0)
        return queued / max(self.rate, 1e-9) if queued > 0 and self.rate is not None else 0.0

    @contextmanager
    def admit(self, tenant: Tenant | None, sequences: int, tokens: float) -> Iterator[None]:
        """Count a request while it is in flight.

        tokens: of KV cache that it will need.

        Raises ApiError 429 if the request must be refused, and then counts nothing.
        """
        self._observe()
        self._require_place(tenant, sequences)
        self._require_short_wait(tenant, sequences, tokens)
        name = "" if tenant is None else tenant.name
        need = round(tokens)
        self._weights[name] = 1.0 if tenant is None else tenant.weight
        self._sequences[name] += sequences
        self._tokens[name] += need
        try:
            yield
        finally:
            self._observe()
            self._freed.set()
            self._sequences[name] -= sequences
            self._tokens[name] -= need
            if not self._sequences[name]:
                del self._sequences[name], self._tokens[name], self._weights[name]

    @asynccontextmanager
    async def in_background(self, sequences: int) -> AsyncGenerator[None]:
        """Count sequences which take only seats that others leave, and wait for such seats.

        One request at a time goes on even if there are none: the engine serves it last.
        """
        async with self._turn:
            while (
                self._in_background
                and self._sequences.total() + self._in_background + sequences > self.capacity.seats
            ):
                self._freed.clear()
                await self._freed.wait()
            self._in_background += sequences
        try:
            yield
        finally:
            self._in_background -= sequences
            self._freed.set()

    def _require_place(self, tenant: Tenant | None, sequences: int) -> None:
        total, most = self._sequences.total(), self.capacity.sequences
        free = most - total
        if sequences > free:
            raise self._refused(
                f"{total} sequences are in flight of {most} at most",
                "overloaded",
                self._seconds_for(sequences - free),
            )
        if tenant is None:
            return
        # A tenant may hold at most as many as stay free, so there is always room for another
        # tenant (dynamic thresholds, Choudhury and Hahne 1998).
        mine = self._sequences[tenant.name]
        if mine + sequences > max(free, 1):
            raise self._refused(
                f"{mine} sequences of yours are in flight, and {free} more are kept for others",
                "tenant_overloaded",
                self._seconds_for(mine + sequences - free),
            )

    def _require_short_wait(self, tenant: Tenant | None, sequences: int, tokens: float) -> None:
        name, weight = ("", 1.0) if tenant is None else (tenant.name, tenant.weight)
        rate, mine = self.rate, self._tokens[name]
        if rate is None or not mine:
            return
        share = weight / sum((self._weights | {name: weight}).values())
        queued = mine + tokens - share * self._at_once(sequences, tokens)
        wait = queued / max(share * rate, 1e-9)
        if wait > self.capacity.max_wait:
            raise self._refused(
                f"this request would wait about {min(wait, 1e6):.0f} s, longer than the "
                f"{self.capacity.max_wait:g} s allowed",
                "queue_too_long",
                wait - self.capacity.max_wait,
            )

    def _at_once(self, sequences: int, tokens: float) -> float:
        """Of the tokens in flight plus a new request, how many fit in both cache and seats."""
        count = self._sequences.total() + sequences
        size = (self._tokens.total() + tokens) / max(count, 1)
        return min(self.capacity.tokens(size), self.capacity.seats * size)

    def _seconds_for(self, sequences: int) -> float:
        """Seconds until so many sequences have ended; ``retry_after.BUSY`` if no rate is known."""
        if self.rate is None:
            return retry_after.BUSY
        size = self._tokens.total() / max(self._sequences.total(), 1)
        return sequences * size / max(self.rate, 1e-9)

    def _observe(self) -> None:
        """Record what was computed since the sequences in flight last changed."""
        (then, before), (now, computed) = self._seen, (self._clock(), self._computed())
        self._seen = (now, computed)
        sequences, tokens = self._sequences.total(), self._tokens.total()
        size = tokens / max(sequences, 1)
        if sequences > self.capacity.seats or tokens > self.capacity.tokens(size):
            keep = math.exp((then - now) / _MEMORY_SECONDS)
            self._seconds = self._seconds * keep + now - then
            self._work = self._work * keep + computed - before

    def _refused(self, message: str, code: str, seconds: float) -> ApiError:
        after = math.ceil(min(max(seconds, 1), retry_after.LONGEST))
        return ApiError(429, f"{message}: try again in {after} s", code=code, retry_after=after)
