"""Rates and concurrency per tenant, and the headers that tell clients about them.

A rate is a token bucket: it holds one minute's worth and fills steadily. How much a request
generates is known only afterwards. So tokens are taken as they are served, and the bucket may go
below zero; the tenant then waits until it is above zero again. (Libraries for rate limits refuse
amounts that exceed the limit, and so cannot count them.)
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from nybble.server.http.errors import ApiError
from nybble.server.tenancy.tenants import Tenant, Tenants

Clock = Callable[[], float]


class Bucket:
    """Holds ``per_minute`` at most and fills at that rate."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._then = clock()

    @property
    def level(self) -> float:
        """What can be taken now; negative if more was taken than there was."""
        now = self._clock()
        self._level += (now - self._then) * self.per_minute / 60
        self._level, self._then = min(self._level, float(self.per_minute)), now
        return self._level

    def take(self, amount: int) -> None:
        self._level = self.level - amount

    def change_rate(self, per_minute: int) -> None:
        """It stays as full as it is, in parts of the whole: so it is full at the same time."""
        self._level = self.level * per_minute / self.per_minute
        self.per_minute = per_minute

    def seconds_until(self, amount: float) -> float:
        """Seconds until so much can be taken, or the bucket is full."""
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, missing * 60 / self.per_minute)


class Limits(Protocol):
    """What counts tenants' requests and tokens, here or over all servers."""

    def admit(
        self, tenant: Tenant, prompt_tokens: int, *, background: bool = False
    ) -> AbstractAsyncContextManager[None]: ...

    def spend(self, tenant: Tenant, tokens: int) -> None: ...

    def headers(self, tenant: Tenant) -> dict[str, str]: ...


class Limiter:
    """The state of every tenant's limits. It survives a reload of the tenants file.

    A request may have begun before the file was read again: its limits are those of the file now.
    """

    def __init__(self, tenants: Tenants | None = None, clock: Clock = time.monotonic) -> None:
        """tenants: what the file has now; None if nothing is ever read again."""
        self._tenants = tenants
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._running: Counter[str] = Counter()
        self._in_background: Counter[str] = Counter()

    @asynccontextmanager
    async def admit(
        self, tenant: Tenant, prompt_tokens: int, *, background: bool = False
    ) -> AsyncIterator[None]:
        """Count a request while it runs. Raises ApiError 429 at a limit, and counts nothing.

        background: leave the tenant's other requests half of each rate, and count for nothing
            against its concurrency when they come.
        """
        tenant = self._now(tenant)
        most, running = tenant.max_concurrency, self._running[tenant.name]
        if background:
            running += self._in_background[tenant.name]
        if most is not None and running >= most:
            raise refused(f"{most} concurrent requests", 1)
        requests, tokens = self._rates(tenant)
        for bucket, amount, kind in ((requests, 1, "requests"), (tokens, prompt_tokens, "tokens")):
            if bucket is None:
                continue
            left = bucket.per_minute // 2 if background else 0
            if (wait := bucket.seconds_until(amount + left)) > 0:
                raise refused(f"{bucket.per_minute} {kind} per minute", wait)
        if requests is not None:
            requests.take(1)
        self.spend(tenant, prompt_tokens)
        counted = self._in_background if background else self._running
        counted[tenant.name] += 1
        try:
            yield
        finally:
            counted[tenant.name] -= 1

    def spend(self, tenant: Tenant, tokens: int) -> None:
        """Count tokens served."""
        bucket = self._rates(tenant)[1]
        if bucket is not None:
            bucket.take(tokens)

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*`` for the limits the tenant has."""
        kinds = zip(("requests", "tokens"), self._rates(tenant), strict=True)
        return limit_headers(
            {
                kind: (bucket.per_minute, bucket.level, bucket.seconds_until(bucket.per_minute))
                for kind, bucket in kinds
                if bucket is not None
            }
        )

    def _now(self, tenant: Tenant) -> Tenant:
        return tenant if self._tenants is None else self._tenants.now(tenant)

    def _rates(self, tenant: Tenant) -> tuple[Bucket | None, Bucket | None]:
        tenant = self._now(tenant)
        return (
            self._bucket(tenant.name, "requests", tenant.requests_per_minute),
            self._bucket(tenant.name, "tokens", tenant.tokens_per_minute),
        )

    def _bucket(self, name: str, kind: str, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        bucket = self._buckets.get((name, kind))
        if bucket is None:
            bucket = self._buckets[name, kind] = Bucket(per_minute, self._clock)
        elif bucket.per_minute != per_minute:  # the limit in the file has changed
            bucket.change_rate(per_minute)
        return bucket


def limit_headers(levels: Mapping[str, tuple[int, float, float]]) -> dict[str, str]:
    """OpenAI's ``x-ratelimit-*``: by kind, the rate a minute, what is left of it, and the seconds
    until it is whole."""
    headers = {}
    for kind, (per_minute, level, seconds) in levels.items():
        headers[f"x-ratelimit-limit-{kind}"] = str(per_minute)
        headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(level)))
        headers[f"x-ratelimit-reset-{kind}"] = f"{seconds:.3f}s"
    return headers


def refused(limit: str, seconds: float) -> ApiError:
    """The error of a tenant that has reached a limit."""
    return ApiError(
        429,
        f"the limit of {limit} is reached: try again in {math.ceil(seconds)} s",
        code="rate_limit_exceeded",
        retry_after=math.ceil(seconds),
    )
