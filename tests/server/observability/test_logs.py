"""What the log says of a request, and what it must never say."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from nybble.engine import Engine
from nybble.server.observability.logs import JsonFormatter, LogEvent
from nybble.server.tenancy.tenants import new_key

from ..client import COMPLETIONS, Client, run
from ..conftest import COMMAND, MODEL

SECRET = "swordfish"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the server's loggers write as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("nybble")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def entries(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_a_request_is_one_line_with_its_id_route_status_time_and_tokens(
    engine: Engine, log: io.StringIO
) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "n": 2}
        headers = {"X-Request-Id": "abc-1"}
        await (await client.post(COMPLETIONS, json=body, headers=headers)).read()
        stream = {**body, "stream": True}
        await (await client.post(COMPLETIONS, json=stream, headers=headers)).read()

    run(engine, scenario)
    whole, streamed = entries(log)
    for entry in (whole, streamed):
        assert datetime.fromisoformat(entry.pop("time")).tzinfo is not None
        assert 0 < entry.pop("seconds") < 60
        assert entry == {
            "level": "info",
            "logger": "nybble.server.app",
            "message": "request",
            "request_id": "abc-1",
            "method": "POST",
            "route": COMPLETIONS,
            "status": 200,
            "sequences": 2,
            "prompt_tokens": 3,
            "cached_tokens": 0,
            "completion_tokens": 8,
        }


def test_a_failure_has_its_cause_and_what_was_generated_until_then(
    engine: Engine, log: io.StringIO
) -> None:
    async def scenario(client: Client) -> None:
        await client.post(COMPLETIONS, json={"model": "other", "prompt": "x"})
        body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
        async with client.post(COMPLETIONS, json={**body, "stream": True}) as response:
            assert await response.content.readline()
            await asyncio.to_thread(engine.stop)
            await response.read()

    run(engine, scenario)
    refused, broken = entries(log)
    assert (refused["status"], refused["error"]) == (404, "model_not_found")
    assert "prompt_tokens" not in refused
    assert (broken["status"], broken["error"]) == (200, "engine_unavailable")
    assert 1 <= broken["completion_tokens"] < 200


def test_a_bug_is_one_line_with_its_traceback_and_the_requests_id(
    engine: Engine, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(engine, "generate", fail)

    async def scenario(client: Client) -> None:
        headers = {"X-Request-Id": "abc-2"}
        body = {"model": "tiny", "prompt": "x"}
        async with client.post(COMPLETIONS, json=body, headers=headers) as response:
            assert response.status == 500

    run(engine, scenario)
    bug, request = entries(log)
    assert (bug["level"], bug["request_id"]) == ("error", "abc-2")
    assert "RuntimeError: two\nlines" in bug["exception"]
    assert (request["status"], request["error"]) == (500, "internal_error")


def test_probes_and_scrapes_are_logged_only_where_they_fail_or_someone_debugs(
    engine: Engine, log: io.StringIO
) -> None:
    async def scenario(client: Client) -> None:
        for path in ("/health", "/metrics", "/version", "/v1/models", "/nothing"):
            await client.get(path)
        await asyncio.to_thread(engine.stop)
        await client.get("/health")

    run(engine, scenario)
    levels = [
        (entry["route"], entry["level"]) for entry in entries(log) if entry["message"] == "request"
    ]
    assert levels == [
        ("/health", "debug"),
        ("/metrics", "debug"),
        ("/version", "debug"),
        ("/v1/models", "info"),
        ("unknown", "info"),
        ("/health", "info"),
    ]


def test_events_are_readable_as_text() -> None:
    assert str(LogEvent("request", {"status": 200, "tenant": None})) == "request status=200"


@pytest.mark.parametrize("format", ["json", pytest.param("text", marks=pytest.mark.slow)])
def test_neither_prompts_nor_outputs_nor_keys_are_logged(
    format: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    key, stored = new_key()
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[tenants.acme]\nkeys = ["{stored}"]\n')
    process = subprocess.Popen(
        [
            *(*COMMAND, "serve", "--model", str(tiny_model()), "--served-model-name", MODEL),
            *("--port", "0", "--kv-cache-memory", "16MiB", "--tenants", str(tenants)),
            *("--log-level", "debug", "--log-format", format),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"http://\S+?/v1", line):
                break
        url, headers = match[0], {"Authorization": f"Bearer {key}"}
        body = {"model": MODEL, "prompt": SECRET, "max_tokens": 4, "user": SECRET}
        done = httpx.post(f"{url}/completions?q={SECRET}", json=body, headers=headers)
        assert done.status_code == 200
        # Refused for what it says, whoever sends it, by parsing, by a key nobody has.
        refused = {"model": MODEL, "prompt": "x", "stop": [SECRET] * 99}
        assert httpx.post(f"{url}/completions", json=refused, headers=headers).status_code == 400
        broken = SECRET.encode()
        as_json = headers | {"Content-Type": "application/json"}
        assert httpx.post(f"{url}/completions", content=broken, headers=as_json).status_code == 400
        wrong = {"Authorization": f"Bearer {SECRET}"}
        assert httpx.post(f"{url}/completions", json=body, headers=wrong).status_code == 401
        process.terminate()
        lines += process.stderr.readlines()
    finally:
        process.kill()
        process.wait()
    text = "".join(lines)
    assert text.count("request_id") == 4
    assert SECRET not in text
    assert key not in text
    assert "acme" in text
    assert "invalid_api_key" in text
    if format == "json":
        logged = [json.loads(line) for line in lines]  # progress and the banner among them
        assert {entry["tenant"] for entry in logged if "tenant" in entry} == {"acme"}


def test_what_keeps_the_server_from_starting_is_an_object_too() -> None:
    options = ("--model", "nothing", "--port", "0", "--log-format", "json")
    done = subprocess.run([*COMMAND, "serve", *options], capture_output=True, text=True)
    assert done.returncode == 1
    *before, entry = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["level"] for line in before} <= {"info"}
    assert entry["level"] == "error"
    assert "was not found" in entry["message"]
