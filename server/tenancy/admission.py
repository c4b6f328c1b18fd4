"""Which requests are let in: those that can be served without waiting too long.

A request in flight will come to hold KV blocks for the part of its prompt that the prefix cache
lacks and for its output, whose length is estimated. What all in flight need beyond what can be
computed at once has to wait until as many tokens have been computed, so how long is known from the
rate observed while there was a queue. (vLLM bounds queued requests and queued tokens, and has the
operator work out the second from the wait he wants; this measures the rate.)

The scheduler serves tenants by weight, so each is judged by its own queue and its share of the
rate: who floods waits for himself, and who has nothing in flight is let in. The bound on sequences
holds beside all this.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError
from nybble.server.tenancy.tenants import Tenant

Clock = Callable[[], float]

_MEMORY_SECONDS = 60.0  # after which a rate observed counts for a third of what it did
_MIN_SECONDS = 1.0  # of a queue, before its rate says anything
_MEMORY_SEQUENCES = 200
_FIRST_GUESS = 256.0  # tokens of output, before any was seen


@dataclass(frozen=True)
class Capacity:
    """sequences: in flight at most. seats: of these computed at once. tokens: in the KV cache.
    max_wait: seconds a sequence may wait before it is computed. sequence_tokens: in the KV cache of
    one sequence at most, however long it is."""

    sequences: int
    seats: int
    tokens: int
    max_wait: float
    sequence_tokens: float = math.inf


class Needs:
    """What sequences need of the KV cache, from those seen.

    Some outputs end by themselves, others at their limit, of which is known only that they are
    longer: the mean of outputs without limits is all tokens seen over the ends (the estimate for
    censored lifetimes with a constant rate of ends).
    """

    def __init__(self) -> None:
        self._outputs, self._ends = _FIRST_GUESS, 1.0
        self._prompts = self._cached = 0.0

    def add(self, prompt: int, cached: int, output: int, *, ended: bool) -> None:
        """Take note of a sequence's tokens. ended: by itself, not at a limit or for its client."""
        keep = 1 - 1 / _MEMORY_SEQUENCES
        self._outputs = self._outputs * keep + output
        self._ends = self._ends * keep + ended
        self._prompts = self._prompts * keep + prompt
        self._cached = self._cached * keep + cached

    def of_prompt(self, tokens: int) -> float:
        """Tokens of a prompt that the prefix cache will probably lack."""
        return tokens * (1 - self._cached / max(self._prompts, 1.0))

    def of_output(self, limit: int) -> float:
        """Tokens of an output that is cut off at ``limit``."""
        mean = self._outputs / max(self._ends, 1e-9)
        return mean * -math.expm1(-limit / mean) if limit else 0.0


class Admission:
    """Counts what is in flight, by tenant, and turns away what would wait too long.

    computed: tells how many tokens, of prompts and outputs, the engine has computed so far.
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
        # Of the time there was a queue, the past counting less and less.
        self._seconds = self._work = 0.0
        self._seen = (clock(), computed())

    @property
    def rate(self) -> float | None:
        """Tokens computed a second while there is a queue; None where there was none yet."""
        return self._work / self._seconds if self._seconds >= _MIN_SECONDS else None

    @property
    def predicted_wait(self) -> float:
        """Seconds until what is in flight now could all be computed at once; 0 if unknown."""
        queued = self._tokens.total() - self._at_once(0, 0)
        return queued / max(self.rate, 1e-9) if queued > 0 and self.rate is not None else 0.0

    @contextmanager
    def admit(self, tenant: Tenant | None, sequences: int, tokens: float) -> Iterator[None]:
        """Count a request while it is in flight. tokens: of KV cache it will need.

        Raises ApiError 429, and then counts nothing.
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
            self._sequences[name] -= sequences
            self._tokens[name] -= need
            if not self._sequences[name]:
                del self._sequences[name], self._tokens[name], self._weights[name]

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
        # A tenant may hold as many as are free, so however many it sends there is room for another
        # (dynamic thresholds, Choudhury and Hahne 1998).
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
        """Tokens of what is in flight, and a newcomer, that fit into cache and seats together."""
        count = self._sequences.total() + sequences
        size = (self._tokens.total() + tokens) / max(count, 1)
        return min(self._fit_cache(size), self.capacity.seats * size)

    def _fit_cache(self, size: float) -> float:
        """Tokens of sequences of mean size ``size`` that fit: of long ones a part may be kept."""
        return self.capacity.tokens * max(1.0, size / self.capacity.sequence_tokens)

    def _seconds_for(self, sequences: int) -> float:
        """Until so many sequences have ended; 5 where no rate is known."""
        if self.rate is None:
            return retry_after.BUSY
        size = self._tokens.total() / max(self._sequences.total(), 1)
        return sequences * size / max(self.rate, 1e-9)

    def _observe(self) -> None:
        """Take note of what was computed since the last change of what is in flight."""
        (then, before), (now, computed) = self._seen, (self._clock(), self._computed())
        self._seen = (now, computed)
        sequences, tokens = self._sequences.total(), self._tokens.total()
        size = tokens / max(sequences, 1)
        if sequences > self.capacity.seats or tokens > self._fit_cache(size):
            keep = math.exp((then - now) / _MEMORY_SECONDS)
            self._seconds = self._seconds * keep + now - then
            self._work = self._work * keep + computed - before

    def _refused(self, message: str, code: str, seconds: float) -> ApiError:
        after = math.ceil(min(max(seconds, 1), retry_after.LONGEST))
        return ApiError(429, f"{message}: try again in {after} s", code=code, retry_after=after)
