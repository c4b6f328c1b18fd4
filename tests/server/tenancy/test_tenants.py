"""Tenants get what their entry in the file allows, and no more."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nybble.engine import AdapterConfig, Engine, Request
from nybble.loaders import open_checkpoint
from nybble.server.http.errors import ApiError
from nybble.server.tenancy.limits import Limiter, Limits
from nybble.server.tenancy.tenants import Tenant, Tenants, TenantsError, new_key

from ..client import COMPLETIONS, Client, run
from ..conftest import CONFIG, ServerProcess, running_server
from ..forked import ForkedServer

KEY, STORED = new_key()
OTHER_KEY, OTHER_STORED = new_key()
ASK: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 5, "ignore_eos": True}
AS_ACME = {"Authorization": f"Bearer {KEY}"}
AS_OTHER = {"Authorization": f"Bearer {OTHER_KEY}"}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """``file("weight = 2", …)`` writes a tenant acme with these lines, and one called other."""

    def write(*lines: str) -> Path:
        path = tmp_path / "tenants.toml"
        acme = "\n".join([f'[tenants.acme]\nkeys = ["{STORED}"]', *lines])
        path.write_text(f'{acme}\n[tenants.other]\nkeys = ["{OTHER_STORED}"]\n')
        return path

    return write


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=8))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()
    yield engine
    engine.stop()


async def post(
    client: Client, headers: dict[str, str], **more: Any
) -> tuple[int, dict[str, Any], dict[str, str]]:
    async with client.post(COMPLETIONS, json={**ASK, **more}, headers=headers) as response:
        return response.status, await response.json(), dict(response.headers)


def test_a_key_is_found_by_its_hash(file: Callable[..., Path]) -> None:
    path = file("weight = 2.5")
    tenants = Tenants(path)
    tenant = tenants.find(KEY)
    assert tenant is not None
    assert (tenant.name, tenant.weight) == ("acme", 2.5)
    assert tenants.find(KEY + "x") is None
    assert tenants.find(STORED) is None
    assert KEY not in path.read_text()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["weight = 0"], "tenants.acme.weight: Input should be greater than 0"),
        (["requests_per_minute = 0"], "tenants.acme.requests_per_minute: Input should be greater"),
        (["tokens = 5"], "tenants.acme.tokens: there is no such setting"),
        (["weight = "], "cannot be read"),
        ([f'[tenants.b]\nkeys = ["{STORED}"]'], "acme and b have a key in common"),
        (['[tenants.b]\nkeys = ["secret"]'], "tenants.b.keys.0: expected sha256: and 64 digits"),
        (["[tenants.b]"], "tenants.b.keys: it has to be given"),
        (['[tenants.""]\nkeys = []'], "tenants..name"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_entry(
    file: Callable[..., Path], lines: list[str], message: str
) -> None:
    with pytest.raises(TenantsError, match=re.escape(message)):
        Tenants(file(*lines))


def test_an_empty_file_is_told_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    path.touch()
    said = f"{path}: it has no tenants, expected a table [tenants.NAME] for each"
    with pytest.raises(TenantsError, match=f"^{re.escape(said)}$"):
        Tenants(path)


def test_a_broken_file_changes_nothing_when_read_again(
    file: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    tenants = Tenants(file("weight = 2"))
    file("weight = -1")
    with caplog.at_level(logging.ERROR):
        tenants.reload()
    assert "the tenants stay as they were" in caplog.text
    assert tenants.find(KEY).weight == 2  # type: ignore[union-attr]
    file("weight = 3")
    tenants.reload()
    assert tenants.find(KEY).weight == 3  # type: ignore[union-attr]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def tenant(**limits: Any) -> Tenant:
    return Tenant(name="t", keys=(STORED,), **limits)


async def use(limits: Limits, tenant: Tenant, prompt: int = 1, generated: int = 0) -> None:
    async with limits.admit(tenant, prompt):
        limits.spend(tenant, generated)


async def requests_per_minute_refill_steadily() -> None:
    clock, one = Clock(), tenant(requests_per_minute=2)
    limiter = Limiter(clock=clock)
    for _ in range(2):
        await use(limiter, one, 10)
    with pytest.raises(ApiError, match="limit of 2 requests per minute") as refused:
        await use(limiter, one)
    assert (refused.value.status, refused.value.retry_after) == (429, 30)
    assert limiter.headers(one) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.000s",
    }
    clock.now += 30
    await use(limiter, one)
    with pytest.raises(ApiError):
        await use(limiter, one)


async def generated_tokens_are_paid_back() -> None:
    clock, one = Clock(), tenant(tokens_per_minute=60)
    limiter = Limiter(clock=clock)
    await use(limiter, one, 20, generated=100)
    clock.now += 59
    with pytest.raises(ApiError, match="60 tokens per minute") as refused:
        await use(limiter, one)
    assert refused.value.retry_after == 2
    clock.now += 2
    await use(limiter, one)
    # A prompt above the limit waits for a full minute's worth, not for ever.
    clock.now += 120
    await use(limiter, one, 1000)
    with pytest.raises(ApiError) as refused:
        await use(limiter, one)
    assert refused.value.retry_after == 941


async def a_refused_request_counts_nothing_and_concurrency_ends_with_the_request() -> None:
    one = tenant(max_concurrency=1, requests_per_minute=5)
    limiter = Limiter(clock=Clock())
    async with limiter.admit(one, 1):
        with pytest.raises(ApiError, match="1 concurrent"):
            await use(limiter, one)
    await use(limiter, one)
    assert limiter.headers(one)["x-ratelimit-remaining-requests"] == "3"


async def a_changed_rate_leaves_what_is_left_in_proportion() -> None:
    clock = Clock()
    limiter = Limiter(clock=clock)
    await use(limiter, tenant(requests_per_minute=2))
    assert limiter.headers(tenant(requests_per_minute=6))["x-ratelimit-remaining-requests"] == "3"
    for _ in range(3):
        await use(limiter, tenant(requests_per_minute=6, weight=2.0))
    with pytest.raises(ApiError, match="limit of 4 requests per minute"):
        await use(limiter, tenant(requests_per_minute=4))
    # What was taken beyond the limit is still to be paid back, in the same time.
    await use(limiter, tenant(requests_per_minute=None, tokens_per_minute=100), 300)
    clock.now += 119
    with pytest.raises(ApiError, match="limit of 1000 tokens"):
        await use(limiter, tenant(tokens_per_minute=1000))
    clock.now += 2
    await use(limiter, tenant(tokens_per_minute=1000))


@pytest.mark.parametrize(
    "scenario",
    [
        requests_per_minute_refill_steadily,
        generated_tokens_are_paid_back,
        a_refused_request_counts_nothing_and_concurrency_ends_with_the_request,
        a_changed_rate_leaves_what_is_left_in_proportion,
    ],
)
def test_limits(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(scenario())


def test_a_stream_from_before_a_reload_spends_by_the_file_of_now(
    file: Callable[..., Path],
) -> None:
    tenants = Tenants(file("tokens_per_minute = 1000"))
    limiter = Limiter(tenants, Clock())
    before = tenants.named("acme")
    assert before is not None
    file("tokens_per_minute = 1200")
    tenants.reload()
    now = tenants.named("acme")
    assert now is not None

    async def scenario() -> None:
        async with limiter.admit(now, 1200):
            for _ in range(3):
                limiter.spend(before, 1)
                with pytest.raises(ApiError, match="limit of 1200 tokens"):
                    await use(limiter, now)
                # Whose request has been read while the file was read again.
                with pytest.raises(ApiError, match="limit of 1200 tokens"):
                    await use(limiter, before)
        assert limiter.headers(before) == limiter.headers(now)
        assert limiter.headers(now)["x-ratelimit-limit-tokens"] == "1200"

    asyncio.run(scenario())


def test_limits_and_their_headers_over_http(engine: Engine, file: Callable[..., Path]) -> None:
    tenants = Tenants(file("requests_per_minute = 2", "tokens_per_minute = 1000"))

    async def scenario(client: Client) -> None:
        for remaining in ("1", "0"):
            status, body, headers = await post(client, AS_ACME)
            assert status == 200
            assert headers["x-ratelimit-limit-requests"] == "2"
            assert headers["x-ratelimit-remaining-requests"] == remaining
        spent = 2 * body["usage"]["total_tokens"]
        assert abs(int(headers["x-ratelimit-remaining-tokens"]) - (1000 - spent)) <= 20
        status, body, headers = await post(client, AS_ACME)
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(headers["Retry-After"]) <= 30
        assert (await post(client, AS_OTHER))[0] == 200
        assert (await post(client, {}))[0] == 401
        metrics = await (await client.get("/metrics")).text()
        assert 'nybble_tenant_sequences_total{tenant="acme"} 2.0' in metrics

    run(engine, scenario, tenants=tenants)


def test_a_tenant_sees_and_uses_only_what_its_patterns_name(
    engine: Engine, file: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    engine.load_adapter("acme-poet", str(tiny_adapter(seed=1)))
    engine.load_adapter("secret", str(tiny_adapter(seed=2)))
    tenants = Tenants(file("models = []", 'adapters = ["acme-*"]'))

    async def scenario(client: Client) -> None:
        models = (await (await client.get("/v1/models", headers=AS_ACME)).json())["data"]
        assert [model["id"] for model in models] == ["acme-poet"]
        assert (await post(client, AS_ACME, model="acme-poet"))[0] == 200
        for name in ("tiny", "secret", "nothing"):
            status, body, _ = await post(client, AS_ACME, model=name)
            assert status == 404
            assert body["error"]["message"].endswith("does not exist; this server has acme-poet")
            assert (await client.get(f"/v1/models/{name}", headers=AS_ACME)).status == 404
        status, _, _ = await post(client, AS_ACME, model="acme-poet", adapter="secret")
        assert status == 404
        assert (await post(client, AS_OTHER, model="tiny", adapter="secret"))[0] == 200

    run(engine, scenario, tenants=tenants)


def test_tenant_and_weight_reach_the_scheduler(
    engine: Engine, file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Request] = []
    generate = engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda request: (seen.append(request), generate(request))[1]
    )

    async def scenario(client: Client) -> None:
        await post(client, AS_ACME)
        await post(client, AS_OTHER)
        await post(client, {"Authorization": "Bearer plain"})

    run(engine, scenario, tenants=Tenants(file("weight = 4")), api_keys=["plain"])
    assert [(request.tenant, request.weight) for request in seen] == [
        ("acme", 4.0),
        ("other", 1.0),
        ("", 1.0),
    ]


def test_a_flooding_tenant_leaves_room_in_the_queue_for_another(
    engine: Engine, file: Callable[..., Path]
) -> None:
    async def scenario(client: Client) -> None:
        flood = [asyncio.create_task(post(client, AS_ACME, max_tokens=300)) for _ in range(40)]
        while engine.stats().running < 8:
            await asyncio.sleep(0.01)
        status, body, _ = await post(client, AS_OTHER)
        assert status == 200, body
        statuses = [status for status, _, _ in await asyncio.gather(*flood)]
        assert statuses.count(200) >= 8
        assert statuses.count(429) >= 24

    run(engine, scenario, tenants=Tenants(file()))


def test_sighup_reads_the_file_again_under_load(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A stream goes on though its key is gone, what was counted stays counted, and a file that
    makes no sense changes nothing."""
    path = tmp_path / "tenants.toml"
    other = f'[tenants.other]\nkeys = ["{OTHER_STORED}"]\nrequests_per_minute = 5\n'
    path.write_text(f'[tenants.acme]\nkeys = ["{STORED}"]\n{other}')
    long = {**ASK, "max_tokens": 900, "stream": True}

    async def scenario(server: ServerProcess) -> None:
        async def log(message: str) -> None:
            while message not in "".join(server.lines):
                await asyncio.sleep(0.02)

        async with aiohttp.ClientSession(server.url) as client:

            async def remaining() -> tuple[int, str]:
                async with client.post(COMPLETIONS, json=ASK, headers=AS_OTHER) as response:
                    return response.status, response.headers["x-ratelimit-remaining-requests"]

            async def known(headers: dict[str, str]) -> int:
                async with client.get("/v1/models", headers=headers) as response:
                    return response.status

            began = time.monotonic()
            assert [await remaining(), await remaining()] == [(200, "4"), (200, "3")]
            async with client.post(COMPLETIONS, json=long, headers=AS_ACME) as stream:
                await stream.content.readline()
                path.write_text(other)
                server.process.send_signal(signal.SIGHUP)
                await log("was read again")
                assert (await known(AS_ACME), await known(AS_OTHER)) == (401, 200)
                path.write_text("[tenants.other]\nkeys = [")
                server.process.send_signal(signal.SIGHUP)
                await log("the tenants stay as they were: ")
                assert (await known(AS_ACME), await known(AS_OTHER)) == (401, 200)
                assert not stream.content.at_eof()
                lines = [line async for line in stream.content if line.startswith(b"data: ")]
                assert lines[-1] == b"data: [DONE]\n"
                assert b'"finish_reason":"length"' in lines[-2]
            status, left = await remaining()
            assert status == 200
            assert int(left) <= 2 + (time.monotonic() - began) // 12, "5 a minute come back"

    with running_server(tiny_model(max_length=1024), "--tenants", str(path)) as server:
        asyncio.run(asyncio.wait_for(scenario(server), 120))
    assert f"{path} cannot be read" in "".join(server.lines)


def test_sighup_while_the_model_loads_reads_the_file_again(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(f'[tenants.acme]\nkeys = ["{STORED}"]\n')
    options = ("--port", "0", "--kv-cache-memory", "16MiB", "--tenants", str(path))
    server = ForkedServer(["serve", "--model", str(tiny_model()), *options], {**os.environ})
    lines: list[str] = []
    try:
        for line in server.stderr:
            lines.append(line)
            if "starting" in line:
                server.send_signal(signal.SIGHUP)
            if "Serving" in line:
                break
        else:
            raise AssertionError(f"it ended with {server.wait(60)}:\n" + "".join(lines))
    finally:
        server.kill()
        server.wait()
    assert f"{path} was read again" in "".join(lines)
