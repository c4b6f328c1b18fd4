"""Clients that leave, and servers that are told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from nybble.engine import Engine
from nybble.server.listen import bind
from nybble.server.serve import serve
from openai import OpenAI

from .conftest import COMMAND, running_server
from .test_errors import COMPLETIONS, Client, run

LONG: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 450, "ignore_eos": True}


async def settled(engine: Engine) -> None:
    for _ in range(300):
        stats = engine.stats()
        if not stats.running and not stats.waiting:
            assert stats.kv_blocks_free == stats.kv_blocks_total
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still computing: {engine.stats()}")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_takes_its_sequences_along(
    engine: Engine, stream: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slow enough that the sequences could not have finished by themselves.
    compute = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda batch: (time.sleep(0.01), compute(batch))[1])

    async def scenario(client: Client) -> None:
        request = asyncio.create_task(
            client.post(COMPLETIONS, json={**LONG, "stream": stream, "n": n})
        )
        while engine.stats().running < n:
            await asyncio.sleep(0.01)
        if stream:
            (await request).close()
        else:
            request.cancel()
        await settled(engine)
        assert engine.stats().generation_tokens < 300
        metrics = await (await client.get("/metrics")).text()
        assert f'nybble_sequences_finished_total{{reason="cancelled"}} {n}.0' in metrics

    run(engine, scenario)


def test_a_reader_that_stalls_holds_up_nobody_else(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(COMPLETIONS, json={**LONG, "stream": True}) as stalled:
            # Nothing of it is read while another request is answered in full.
            async with client.post(COMPLETIONS, json=LONG) as other:
                usage = (await other.json())["usage"]
            assert usage["completion_tokens"] == LONG["max_tokens"]
            assert (await stalled.read()).endswith(b"data: [DONE]\n\n")

    run(engine, scenario)


def test_on_sigterm_requests_finish_new_ones_get_503_and_the_exit_code_is_0(
    tiny_model: Callable[..., Path],
) -> None:
    with running_server(tiny_model(max_length=4096)) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="tiny",
            prompt="x",
            max_tokens=3000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        server.terminate()
        time.sleep(0.3)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="tiny", prompt="x")
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["Retry-After"]) > 0
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert server.process.wait(20) == 0


def test_requests_that_take_too_long_are_told_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda batch: (time.sleep(0.02), compute(batch))[1])
    ready = asyncio.Event()

    async def scenario(session: aiohttp.ClientSession, url: str) -> None:
        await ready.wait()
        body = {**LONG, "stream": True}
        async with session.post(url + COMPLETIONS, json=body) as response:
            await response.content.readline()
            os.kill(os.getpid(), signal.SIGTERM)
            assert b"engine_unavailable" in (await response.read()).split(b"\n\n")[-2]

    async def main() -> None:
        sock = bind("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        serving = serve(
            engine,
            sock,
            models=("tiny",),
            max_sequences=4,
            shutdown_timeout=0.3,
            ready=ready.set,
        )
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(serving, scenario(session, url))

    asyncio.run(main())


def test_a_second_signal_ends_the_process_at_once(tiny_model: Callable[..., Path]) -> None:
    with running_server(tiny_model(max_length=4096)) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="tiny",
            prompt="x",
            max_tokens=4000,
            n=4,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        server.terminate()
        time.sleep(0.2)
        server.terminate()
        assert server.process.wait(2) == 128 + 15


def test_a_taken_port_is_found_before_the_model_is_loaded(tiny_model: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "serve", "--model", str(tiny_model()), "--port", port],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}" in done.stderr
