"""Limits over several servers, counted in a real Redis."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import pytest
from redis import Redis

from nybble.server.http.errors import ApiError
from nybble.server.tenancy import shared_limits
from nybble.server.tenancy.shared_limits import SharedLimiter
from nybble.server.tenancy.tenants import Tenant, Tenants

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="neither Valkey nor Redis is installed (apt install redis-server)"
)


class Store:
    """A server of its own on a socket, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = f"unix://{folder}/redis.sock"
        self.start()

    def start(self) -> None:
        assert PROGRAM is not None
        options = ("--port", "0", "--unixsocket", f"{self._folder}/redis.sock", "--save", "")
        self._process = subprocess.Popen(
            [PROGRAM, *options, "--dir", str(self._folder)], stdout=subprocess.DEVNULL
        )
        self.client = Redis.from_url(self.url, decode_responses=True)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.client.ping()
                return
            except OSError:
                assert time.monotonic() < deadline
            except Exception:
                assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.stop()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is there answers: on a busy machine not always in a quarter of a second, after
    which a server counts for itself."""
    monkeypatch.setattr(shared_limits, "_TIMEOUT_SECONDS", 60)


def tenant(**limits: Any) -> Tenant:
    return Tenant(name="acme", keys=("sha256:" + "0" * 64,), **limits)


def servers(
    store: Store,
    scenario: Callable[..., Coroutine[None, None, None]],
    on_failure: Literal["open", "closed"] = "open",
) -> None:
    """Run a scenario with two servers' limiters; nothing is flushed unless it says so."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            limiters = [SharedLimiter(store.url, on_failure) for _ in range(2)]
            for each in limiters:
                stack.push_async_callback(each._redis.aclose)
            await scenario(*limiters)

    asyncio.run(main())


async def use(limits: SharedLimiter, tenant: Tenant, prompt: int = 1, generated: int = 0) -> None:
    async with limits.admit(tenant, prompt):
        limits.spend(tenant, generated)


def value(limiter: SharedLimiter, line: str) -> float:
    text = "".join("".join(family.write()) for family in limiter.families)
    return float(next(each for each in text.splitlines() if each.startswith(line)).split()[-1])


def test_requests_count_wherever_they_are_sent(store: Store) -> None:
    async def scenario(first: SharedLimiter, second: SharedLimiter) -> None:
        one = tenant(requests_per_minute=3)
        await use(first, one)
        await use(second, one)
        assert second.headers(one)["x-ratelimit-remaining-requests"] == "1"
        await use(first, one)
        for each in (first, second):
            with pytest.raises(ApiError, match="limit of 3 requests per minute") as refused:
                await use(each, one)
            assert (refused.value.status, refused.value.retry_after) == (429, 20)

    servers(store, scenario)


def test_generated_tokens_are_told_later_and_paid_back_everywhere(store: Store) -> None:
    async def scenario(first: SharedLimiter, second: SharedLimiter) -> None:
        one = tenant(tokens_per_minute=60)
        await use(first, one, 20, generated=100)
        assert first.headers(one)["x-ratelimit-remaining-tokens"] == "0"
        await use(second, one)  # the first has not told yet
        await first.flush()
        with pytest.raises(ApiError, match="60 tokens per minute") as refused:
            await use(second, one)
        # 121 of the bucket of 60 are used, and one is wanted.
        assert refused.value.retry_after in (61, 62)

    servers(store, scenario)


def test_a_stream_from_before_a_reload_spends_by_the_file_of_now(
    store: Store, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.toml"
    entry = f'[tenants.acme]\nkeys = ["sha256:{"0" * 64}"]\n'
    file.write_text(entry)
    tenants = Tenants(file)
    before = tenants.named("acme")
    assert before is not None

    async def scenario() -> None:
        limiter = SharedLimiter(store.url, "open", tenants)
        try:
            async with limiter.admit(before, 1):
                file.write_text(entry + "tokens_per_minute = 60\n")
                tenants.reload()
                limiter.spend(before, 100)
                await limiter.flush()
            with pytest.raises(ApiError, match="60 tokens per minute"):
                await use(limiter, before)
            assert limiter.headers(before)["x-ratelimit-remaining-tokens"] == "0"
        finally:
            await limiter._redis.aclose()

    asyncio.run(scenario())


def test_running_requests_are_counted_until_they_end_or_their_server_is_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_limits, "_LEASE_SECONDS", 3.0)

    async def scenario(first: SharedLimiter, second: SharedLimiter) -> None:
        one = tenant(max_concurrency=1)
        async with first.admit(one, 1):
            with pytest.raises(ApiError, match="1 concurrent"):
                await use(second, one)
            for _ in range(4):  # renewed for as long as the request runs
                await asyncio.sleep(1)
                await first.flush()
            with pytest.raises(ApiError, match="1 concurrent"):
                await use(second, one)
        await use(second, one)
        # A server that is killed renews nothing.
        await first.admit(one, 1).__aenter__()
        with pytest.raises(ApiError, match="1 concurrent"):
            await use(second, one)
        await asyncio.sleep(3.2)
        await use(second, one)

    servers(store, scenario)


def test_a_background_request_takes_no_place_of_the_others_at_any_server(store: Store) -> None:
    async def scenario(first: SharedLimiter, second: SharedLimiter) -> None:
        one = tenant(max_concurrency=1, requests_per_minute=6)
        async with first.admit(one, 1, background=True):
            # The others' place is free; there is none beside another in the background.
            async with second.admit(one, 1):
                pass
            with pytest.raises(ApiError, match="1 concurrent"):
                async with second.admit(one, 1, background=True):
                    pass
        # One beside an ordinary request waits too: it takes only the room that others leave.
        async with first.admit(one, 1):
            with pytest.raises(ApiError, match="1 concurrent"):
                async with second.admit(one, 1, background=True):
                    pass
        # Three of six are used: the half that is left is the others'.
        with pytest.raises(ApiError, match="6 requests per minute"):
            async with second.admit(one, 1, background=True):
                pass
        for _ in range(3):
            await use(second, one)
        with pytest.raises(ApiError, match="6 requests per minute"):
            await use(first, one)

    servers(store, scenario)


def test_while_the_store_is_away_each_server_counts_for_itself(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_limits, "_PAUSE_SECONDS", 0.2)

    async def scenario(first: SharedLimiter, second: SharedLimiter) -> None:
        one = tenant(requests_per_minute=1, tokens_per_minute=1000)
        await use(first, one)
        store.stop()
        await use(first, one, 10, generated=20)
        await use(second, one)
        with pytest.raises(ApiError, match="1 requests per minute"):
            await use(first, one)
        assert value(first, "nybble_quota_store_failures_total") >= 1
        assert value(first, 'nybble_quota_unshared_requests_total{result="alone"}') >= 1
        store.start()
        await asyncio.sleep(0.25)
        await first.flush()
        # What was served meanwhile is not forgotten.
        full = float(store.client.get("nybble:{acme}:tokens"))  # type: ignore[arg-type]
        assert full - time.time() == pytest.approx(30 * 60 / 1000, abs=0.5)

    servers(store, scenario)


def test_with_closed_a_store_that_is_away_refuses(store: Store) -> None:
    async def scenario(first: SharedLimiter, _: SharedLimiter) -> None:
        one = tenant(requests_per_minute=5)
        store.stop()
        with pytest.raises(ApiError, match="does not answer") as refused:
            await use(first, one)
        assert (refused.value.status, refused.value.code) == (503, "quota_store_unavailable")
        assert value(first, 'nybble_quota_unshared_requests_total{result="refused"}') == 1

    servers(store, scenario, "closed")


def test_tenants_without_limits_leave_nothing_in_the_store(store: Store) -> None:
    async def scenario(first: SharedLimiter, _: SharedLimiter) -> None:
        await use(first, tenant(), 10, generated=10)
        await first.flush()
        assert store.client.keys("*") == []

    servers(store, scenario)
