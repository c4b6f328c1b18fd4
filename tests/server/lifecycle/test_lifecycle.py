"""Clients that leave, and servers that are told to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai import OpenAI

from nybble.engine import Engine, EngineFailedError
from nybble.server.api import respond
from nybble.server.api.prompts import Prompts
from nybble.server.http.listen import bind
from nybble.server.lifecycle import serve
from nybble.server.lifecycle.settings import ServerSettings

from ..client import CHAT, COMPLETIONS, Client, run
from ..conftest import COMMAND, running_server
from ..forked import BECOME_HUNG_SERVER

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


@contextmanager
def stalling_reader(host: str, port: int | None) -> Iterator[socket.socket]:
    """Asks for megabytes, more than the buffers of both sockets take, and reads nothing."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
    body |= {"max_tokens": 450, "ignore_eos": True, "n": 8, "logprobs": True, "top_logprobs": 20}
    data = json.dumps(body).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, port))
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        sock.sendall(head.encode() + data)
        yield sock


async def finished(client: Client, reason: str) -> float:
    text = await (await client.get("/metrics")).text()
    return float(text.partition(f'finished_total{{reason="{reason}"}} ')[2].split()[0])


def test_a_reader_that_stalls_holds_up_nobody_else_and_loses_nothing(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        with stalling_reader(client.host, client.port) as sock:
            while engine.stats().generation_tokens < 8 * 450:
                await asyncio.sleep(0.01)
            async with client.post(COMPLETIONS, json=LONG) as other:
                usage = (await other.json())["usage"]
            assert usage["completion_tokens"] == LONG["max_tokens"]
            # All is computed, but not written into buffers without end.
            assert await finished(client, "length") == 1
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            sock.setblocking(False)
            answer = b""
            while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                answer += await asyncio.get_running_loop().sock_recv(sock, 1 << 20)
            assert answer.count(b'"finish_reason":"length"') == 8
            assert await finished(client, "length") == 9

    run(engine, scenario)


def test_a_reader_that_takes_nothing_for_long_is_given_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(respond, "_STALL_SECONDS", 0.2)

    async def scenario(client: Client) -> None:
        with stalling_reader(client.host, client.port):
            async with asyncio.timeout(60):
                while not await finished(client, "cancelled"):
                    await asyncio.sleep(0.05)
            await settled(engine)

    run(engine, scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_longer_than_its_timeout_ends(
    engine: Engine, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda batch: (time.sleep(0.02), compute(batch))[1])

    async def scenario(client: Client) -> None:
        body = {**LONG, "timeout": 0.2, "stream": stream}
        async with client.post(COMPLETIONS, json=body) as response:
            text = await response.text()
            assert response.status == (200 if stream else 504)
        error = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        assert error["code"] == "timeout"
        await settled(engine)

    run(engine, scenario)


def test_sequences_of_one_request_share_the_prompts_blocks(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": [7] * 40, "max_tokens": 2, "n": 3}
        async with client.post(COMPLETIONS, json=body) as response:
            usage = (await response.json())["usage"]
        # The first computes the prompt; the two others find its two full blocks of 16.
        assert engine.stats().prefix_hit_tokens == 2 * 32
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0

    run(engine, scenario)


def test_long_prompts_are_tokenized_beside_the_event_loop(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    encode = Prompts._encode

    def spy(self: Prompts, text: str, special_tokens: bool) -> tuple[int, ...]:
        threads.append(threading.current_thread())
        return encode(self, text, special_tokens)

    monkeypatch.setattr(Prompts, "_encode", spy)

    async def scenario(client: Client) -> None:
        for prompt in ("x", "x " * 4000):
            await client.post("/tokenize", json={"prompt": prompt})
        short, long = threads
        assert short is threading.main_thread()
        assert long is not threading.main_thread()

    run(engine, scenario)


def test_on_sigterm_requests_finish_new_ones_get_503_and_the_exit_code_is_0(
    tiny_model: Callable[..., Path],
) -> None:
    with running_server(tiny_model(max_length=4096)) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="tiny",
            prompt="x",
            max_tokens=2000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        server.terminate()
        time.sleep(0.2)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="tiny", prompt="x")
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["Retry-After"]) > 0
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert server.process.wait(20) == 0


def test_a_folder_that_does_not_answer_keeps_no_server_from_ending(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("--enable-lora", "--lora-watch", str(tmp_path))
    with running_server(tiny_model(), *options, script=BECOME_HUNG_SERVER) as server:
        # Another thread's line may stand in the same one.
        deadline = time.monotonic() + 60
        while "the folder is being read" not in "".join(server.lines):
            assert time.monotonic() < deadline, "".join(server.lines)
            time.sleep(0.01)
        server.terminate()
        assert server.process.wait(20) == 0


def serving(engine: Engine, scenario: Callable[[str], Awaitable[None]], **options: Any) -> None:
    """Run ``serve`` in this process beside a scenario, which has to end it by a signal."""
    ready = asyncio.Event()

    async def main() -> None:
        sock = bind("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        settings = ServerSettings(**{"models": ("tiny",), "max_sequences": 4, **options})

        async def begin() -> None:
            await ready.wait()
            await scenario(url)

        await asyncio.gather(serve.serve(engine, sock, settings, ready=ready.set), begin())

    asyncio.run(main())


def test_requests_that_take_too_long_are_told_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda batch: (time.sleep(0.02), compute(batch))[1])

    async def scenario(url: str) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url + COMPLETIONS, json={**LONG, "stream": True}) as response,
        ):
            await response.content.readline()
            os.kill(os.getpid(), signal.SIGTERM)
            assert b"engine_unavailable" in (await response.read()).split(b"\n\n")[-2]

    serving(engine, scenario, shutdown_timeout=0.3)


@pytest.mark.slow
def test_a_reader_that_stalls_does_not_keep_a_failed_server_from_ending(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_FLUSH_SECONDS", 3600)  # what others may take
    monkeypatch.setattr(serve, "_FAILED_SECONDS", 0.1)

    def fail(batch: object) -> None:
        raise RuntimeError("the device is gone")

    async def scenario(url: str) -> None:
        with stalling_reader("127.0.0.1", int(url.rpartition(":")[2])):
            while engine.stats().generation_tokens < 8 * 450:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(engine._runner, "run", fail)
            async with (
                aiohttp.ClientSession() as session,
                session.post(url + COMPLETIONS, json=LONG) as response,
            ):
                assert response.status == 500
                assert "the device is gone" in await response.text()
            async with asyncio.timeout(60):
                await asyncio.Event().wait()  # until the server has ended

    with pytest.raises(EngineFailedError, match="the device is gone"):
        serving(engine, scenario, max_sequences=16)


def test_a_client_that_never_finishes_its_headers_is_cut_off_and_a_slow_answer_is_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_KEEPALIVE_SECONDS", 0.4)
    compute = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda batch: (time.sleep(0.02), compute(batch))[1])

    async def scenario(url: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow")
        async with (
            aiohttp.ClientSession() as session,
            session.post(url + COMPLETIONS, json={**LONG, "max_tokens": 60}) as response,
        ):
            assert (await response.json())["usage"]["completion_tokens"] == 60
        async with asyncio.timeout(60):
            with suppress(ConnectionError):
                assert await reader.read() == b""
        os.kill(os.getpid(), signal.SIGTERM)

    serving(engine, scenario)


def test_a_second_signal_ends_requests_with_an_error_and_the_process_at_once(
    tiny_model: Callable[..., Path],
) -> None:
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
        with pytest.raises(openai.APIError, match="the engine was stopped"):
            for _ in stream:
                pass
        assert server.process.wait(5) == 128 + 15
        assert "a second signal (Ctrl-C) ends them at once" in server.log()
        assert server.log().count("a second signal: 1 requests end with an error now") == 1
        assert "Traceback" not in server.log()


def test_a_long_step_does_not_keep_a_second_signal_from_ending_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, entered, leave = engine._runner.run, threading.Event(), threading.Event()

    def slow(batch: Any) -> Any:
        entered.set()
        leave.wait(60)
        return compute(batch)

    monkeypatch.setattr(engine._runner, "run", slow)
    ended: list[int] = []
    monkeypatch.setattr(serve.os, "_exit", lambda code: (ended.append(code), leave.set()))

    async def scenario(url: str) -> None:
        async with aiohttp.ClientSession() as session:
            body = {**LONG, "stream": True}
            asking = asyncio.create_task(session.post(url + COMPLETIONS, json=body))
            await asyncio.to_thread(entered.wait)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0.05)
            async with await asking as response:
                assert b"engine_unavailable" in await response.read()
            assert ended == [128 + signal.SIGINT]

    serving(engine, scenario)


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
