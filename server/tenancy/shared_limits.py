"""Rates and concurrency of tenants counted over all servers, in Redis or Valkey.

The limits are those of :mod:`nybble.server.tenancy.limits`. A bucket is stored as the time at
which it will be full, which is all that a steady rate needs (the generic cell rate algorithm). Each
script runs as one step in the store, by the store's clock. A running request is a member of a
sorted set that expires unless its server renews it, so that a server which is killed keeps nobody
out for long. Tokens are sent in batches.

(Libraries for rate limits refuse amounts above the limit, and so cannot tokens after the fact; none
counts running requests. Connections, retries and scripts are redis-py's.)
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Literal
from uuid import uuid4

from aiohttp import web
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError
from nybble.server.observability.exposition import CounterSeries, Family, counter
from nybble.server.tenancy.limits import Limiter, limit_headers, refused
from nybble.server.tenancy.tenants import Tenant, Tenants

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 0.25
# After a failure the store is left alone for so long: a request must not wait for each timeout.
_PAUSE_SECONDS = 1.0
_FLUSH_SECONDS = 0.25
_LEASE_SECONDS = 15.0
_MINUTE = 60.0

# KEYS: requests, tokens, running. ARGV: requests a minute, tokens a minute, most running (0: no
# limit), prompt tokens, the lease and its seconds, 1 for a background request. Returns which limit
# is reached ("" for none) and the seconds to wait, then the seconds until each bucket is full.
_ADMIT = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local function left(key) return math.max(0, tonumber(redis.call('GET', key) or now) - now) end
local function wait(key, per_minute, amount)
  if per_minute == 0 then return 0 end
  return left(key) - 60 * (1 - math.min(amount, per_minute) / per_minute)
end
local function take(key, per_minute, amount)
  if per_minute == 0 then return 0 end
  local full = left(key) + 60 * amount / per_minute
  redis.call('SET', key, string.format('%.6f', now + full), 'EX', math.ceil(full) + 1)
  return full
end
local requests, tokens = tonumber(ARGV[1]), tonumber(ARGV[2])
local most, prompt = tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
local limit, seconds = '', 0
local background, running = ARGV[7] == '1', redis.call('ZCARD', KEYS[3])
if most > 0 and not background then
  for _, lease in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
    if lease:sub(1, 1) == 'b' then running = running - 1 end
  end
end
local function left_to_others(per_minute)
  return background and math.floor(per_minute / 2) or 0
end
if most > 0 and running >= most then
  limit, seconds = 'running', 1
elseif wait(KEYS[1], requests, 1 + left_to_others(requests)) > 1e-6 then
  limit, seconds = 'requests', wait(KEYS[1], requests, 1 + left_to_others(requests))
elseif wait(KEYS[2], tokens, prompt + left_to_others(tokens)) > 1e-6 then
  limit, seconds = 'tokens', wait(KEYS[2], tokens, prompt + left_to_others(tokens))
else
  take(KEYS[1], requests, 1)
  take(KEYS[2], tokens, prompt)
  if most > 0 then
    redis.call('ZADD', KEYS[3], now + ARGV[6], ARGV[5])
    redis.call('EXPIRE', KEYS[3], math.ceil(ARGV[6]) + 1)
  end
end
return {limit, tostring(seconds), tostring(left(KEYS[1])), tostring(left(KEYS[2]))}
"""

# KEYS: tokens, running. ARGV: tokens a minute, tokens served, a lease's seconds, then leases to
# renew. Returns the seconds until the bucket is full.
_SPEND = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local full = math.max(0, tonumber(redis.call('GET', KEYS[1]) or now) - now)
local per_minute, amount = tonumber(ARGV[1]), tonumber(ARGV[2])
if per_minute > 0 and amount > 0 then
  full = full + 60 * amount / per_minute
  redis.call('SET', KEYS[1], string.format('%.6f', now + full), 'EX', math.ceil(full) + 1)
end
for i = 4, #ARGV do redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[i]) end
if #ARGV > 3 then redis.call('EXPIRE', KEYS[2], math.ceil(ARGV[3]) + 1) end
return tostring(full)
"""


class SharedLimiter:
    """Every tenant's limits over all servers that use the same store."""

    def __init__(
        self,
        url: str,
        on_failure: Literal["open", "closed"],
        tenants: Tenants | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """tenants: what the file has now; None if nothing is ever read again.

        on_failure: while the store does not answer, ``open`` counts in this server alone, and
        ``closed`` refuses tenants' requests with 503.

        Raises ValueError for a URL that redis-py does not know.
        """
        retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
        self._redis = Redis.from_url(
            url,
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            retry=retry,
            decode_responses=True,
        )
        self._admit = self._redis.register_script(_ADMIT)
        self._spend = self._redis.register_script(_SPEND)
        self._closed = on_failure == "closed"
        self._clock = clock
        self._alone = Limiter(tenants, clock)
        self._away_until = -math.inf
        self._server = uuid4().hex[:12]
        self._tenants = tenants
        self._known: dict[str, Tenant] = {}
        self._unsent: Counter[str] = Counter()
        self._leases: defaultdict[str, set[str]] = defaultdict(set)
        self._renewed = clock()
        # When each bucket is full, by this server's clock, as far as this server knows.
        self._full: dict[tuple[str, str], float] = {}
        self._failures = counter(
            "nybble_quota_store_failures", "Times the store of quotas did not answer.", []
        )
        self._unshared = counter(
            "nybble_quota_unshared_requests",
            "Requests of tenants while the store of quotas was away, by what became of them: "
            "counted by this server alone, or refused.",
            ["result"],
        )
        self._failures.labels()
        for result in ("alone", "refused"):
            self._unshared.labels(result)

    @property
    def families(self) -> Sequence[Family[CounterSeries]]:
        return (self._failures, self._unshared)

    @asynccontextmanager
    async def admit(
        self, tenant: Tenant, prompt_tokens: int, *, background: bool = False
    ) -> AsyncIterator[None]:
        """Count a request while it runs. Raises ApiError 429 at a limit, and counts nothing.

        background: leave the tenant's other requests half of each rate, and count for nothing
            against its concurrency when they come.
        """
        tenant = self._known[tenant.name] = self._now(tenant)
        async with AsyncExitStack() as stack:
            lease = f"{'b' if background else 'f'}:{self._server}:{uuid4().hex}"
            if await self._admitted(tenant, prompt_tokens, lease, background):
                stack.push_async_callback(self._release, tenant, lease)
            elif self._closed:
                self._unshared.labels("refused").inc()
                raise ApiError(
                    503,
                    "the store of quotas does not answer",
                    code="quota_store_unavailable",
                    retry_after=retry_after.BUSY,
                )
            else:
                self._unshared.labels("alone").inc()
                alone = self._alone.admit(tenant, prompt_tokens, background=background)
                await stack.enter_async_context(alone)
                self._unsent[tenant.name] += prompt_tokens
            yield

    def spend(self, tenant: Tenant, tokens: int) -> None:
        """Count tokens served. The store is told within a moment."""
        tenant = self._now(tenant)
        if tenant.tokens_per_minute is None:
            return
        self._unsent[tenant.name] += tokens
        if self._is_away():
            self._alone.spend(tenant, tokens)
        now = self._clock()
        full = max(now, self._full.get((tenant.name, "tokens"), now))
        self._full[tenant.name, "tokens"] = full + tokens * _MINUTE / tenant.tokens_per_minute

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*``, as far as this server knows."""
        if self._is_away():
            return self._alone.headers(tenant)
        tenant, levels = self._now(tenant), {}
        now = self._clock()
        for kind, per_minute in _rates(tenant):
            if per_minute:
                left = max(0.0, self._full.get((tenant.name, kind), now) - now)
                levels[kind] = (per_minute, per_minute * (1 - left / _MINUTE), left)
        return limit_headers(levels)

    async def lifespan(self, _: web.Application) -> AsyncGenerator[None]:
        """Tell the store what was served while the application runs."""
        task = asyncio.create_task(self._flush_often())
        yield
        task.cancel()
        await self.flush()
        await self._redis.aclose()

    async def flush(self) -> None:
        """Tell the store of tokens served since the last time, and renew leases if it is time."""
        if self._is_away():
            return
        renewing = self._clock() - self._renewed >= _LEASE_SECONDS / 3
        if renewing:
            self._renewed = self._clock()
        names = {name for name, tokens in self._unsent.items() if tokens}
        if renewing:
            names |= {name for name, leases in self._leases.items() if leases}
        for name in names:
            tokens = self._unsent.pop(name, 0)
            per_minute = self._now(self._known[name]).tokens_per_minute or 0
            arguments = [per_minute, tokens, _LEASE_SECONDS]
            leases = sorted(self._leases[name]) if renewing else []
            sent = False
            with self._failing():
                left = await self._spend(keys=_keys(name)[1:], args=[*arguments, *leases])
                self._full[name, "tokens"] = self._clock() + float(left)
                sent = True
            if not sent:
                self._unsent[name] += tokens
                return

    async def _flush_often(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            await self.flush()

    async def _admitted(
        self, tenant: Tenant, prompt_tokens: int, lease: str, background: bool
    ) -> bool:
        """Whether the store has counted the request; False if it does not answer."""
        if self._is_away():
            return False
        answer: list[str] | None = None
        with self._failing():
            answer = await self._admit(
                keys=_keys(tenant.name),
                args=[
                    tenant.requests_per_minute or 0,
                    tenant.tokens_per_minute or 0,
                    tenant.max_concurrency or 0,
                    prompt_tokens,
                    lease,
                    _LEASE_SECONDS,
                    int(background),
                ],
            )
        if answer is None:
            return False
        limit, seconds, *left = answer
        now = self._clock()
        for (kind, _), each in zip(_rates(tenant), left, strict=True):
            self._full[tenant.name, kind] = now + float(each)
        if limit == "running":
            raise refused(f"{tenant.max_concurrency} concurrent requests", 1)
        if limit:
            raise refused(f"{dict(_rates(tenant))[limit]} {limit} per minute", float(seconds))
        if tenant.max_concurrency is not None:
            self._leases[tenant.name].add(lease)
        return True

    async def _release(self, tenant: Tenant, lease: str) -> None:
        if lease not in self._leases[tenant.name]:
            return
        self._leases[tenant.name].discard(lease)
        # Also if the client has gone away: otherwise it would count until it expires.
        await asyncio.shield(self._end_lease(tenant.name, lease))

    async def _end_lease(self, name: str, lease: str) -> None:
        with self._failing():
            await self._redis.zrem(_keys(name)[2], lease)

    def _now(self, tenant: Tenant) -> Tenant:
        return tenant if self._tenants is None else self._tenants.now(tenant)

    def _is_away(self) -> bool:
        return self._clock() < self._away_until

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Leave the store alone for a while if it does not answer."""
        try:
            yield
        except (RedisError, OSError, TimeoutError) as error:
            if not self._is_away():
                logger.warning("the store of quotas does not answer: %s", error)
            self._failures.labels().inc()
            self._away_until = self._clock() + _PAUSE_SECONDS


def _rates(tenant: Tenant) -> tuple[tuple[str, int | None], ...]:
    return (("requests", tenant.requests_per_minute), ("tokens", tenant.tokens_per_minute))


def _keys(name: str) -> list[Any]:
    # The braces keep one tenant's keys together in a cluster.
    return [f"nybble:{{{name}}}:{kind}" for kind in ("requests", "tokens", "running")]
