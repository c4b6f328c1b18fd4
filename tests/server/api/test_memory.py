"""What a request makes the server hold is bounded, whatever it asks to be read."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nybble.engine import Engine
from nybble.server.api import parse, prompts

from ..client import CHAT, COMPLETIONS, JSON, Client, run
from ..conftest import ServerProcess

EMBEDDINGS = "/v1/embeddings"
BODY = (16 << 20) - 1000  # nearly as much as a body may have
WORDS = "word foo bar "


def resident(pid: int, which: str) -> int:
    """Bytes of memory: VmRSS is the present, VmHWM the peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"{which}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def hostile() -> dict[str, tuple[str, Any, int]]:
    """Path, body and the answer's status."""
    ids = b'{"model":"tiny","prompt":[[7' + b",7" * (BODY // 2) + b"]]}"
    return {
        "words": ("/tokenize", {"prompt": WORDS * (BODY // len(WORDS))}, 400),
        "words, as many as are taken": ("/tokenize", {"prompt": WORDS * 80_000}, 200),
        "tokens": ("/detokenize", b'{"tokens":[7' + b",7" * (BODY // 2) + b"]}", 400),
        "inputs": (EMBEDDINGS, {"model": "tiny", "input": [WORDS * 400] * 2000}, 400),
        "ids": (COMPLETIONS, ids, 400),
        "messages": (
            CHAT,
            {"model": "tiny", "messages": [{"role": "user", "content": "a"}] * 300_000},
            400,
        ),
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells")
def test_the_largest_bodies_two_at_once_take_no_gigabyte(server: ServerProcess) -> None:
    pid = server.process.pid
    before = resident(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew

    async def post(session: aiohttp.ClientSession, path: str, body: Any) -> int:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with session.post(server.url + path, data=data, headers=JSON) as response:
            await response.read()
            return response.status

    async def scenario() -> None:
        async with aiohttp.ClientSession() as session:
            for name, (path, body, status) in hostile().items():
                found = await asyncio.gather(*(post(session, path, body) for _ in range(2)))
                assert found == [status] * 2, name

    asyncio.run(scenario())
    assert resident(pid, "VmHWM") - before < 1 << 30


def test_a_text_far_beyond_the_context_is_refused_after_a_part_of_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_AT_A_TIME", 1000)
    encoded: list[int] = []
    compute = prompts.Prompts._encode
    monkeypatch.setattr(
        prompts.Prompts,
        "_encode",
        lambda self, text, special: (encoded.append(len(text)), compute(self, text, special))[1],
    )

    async def scenario(client: Client) -> None:
        # Within what 512 tokens of the longest kind stand for, but tokens here are shorter.
        for path, body in (
            (CHAT, {"messages": [{"role": "user", "content": "xyz" * 2000}]}),
            (COMPLETIONS, {"prompt": "xyz" * 2000}),
            (EMBEDDINGS, {"input": ["x", "xyz" * 2000]}),
        ):
            async with client.post(path, json={"model": "tiny", **body}) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (400, "context_length_exceeded"), error
                assert "tokens at least" in error["message"]
        assert encoded == []
        # What fits is taken, though it is long enough to be counted first.
        body = {"messages": [{"role": "user", "content": "the " * 300}], "max_tokens": 1}
        async with client.post(CHAT, json={"model": "tiny", **body}) as response:
            assert response.status == 200, await response.text()

    run(engine, scenario)


def test_prompts_of_one_request_are_bounded_together(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_MAX_TOGETHER", 600)

    async def scenario(client: Client) -> None:
        for path, field, inputs, status in (
            (EMBEDDINGS, "input", ["the " * 100] * 5, 200),
            (EMBEDDINGS, "input", ["the " * 100] * 7, 400),
            (COMPLETIONS, "prompt", [[7] * 100] * 6, 200),
            (COMPLETIONS, "prompt", [[7] * 100] * 7, 400),
        ):
            body = {"model": "tiny", field: inputs}
            async with client.post(path, json=body) as response:
                answer = await response.json()
                assert response.status == status, answer
                if status == 400:
                    assert (answer["error"]["code"], answer["error"]["param"]) == (
                        "too_many_tokens",
                        field,
                    )

    run(engine, scenario)


def test_only_a_few_large_bodies_are_read_at_once_and_small_ones_beside_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parse, "_LARGE_PLACES", 2)

    async def scenario(client: Client) -> None:
        writers = []
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{"
        )
        for _ in range(2):
            _, writer = await asyncio.open_connection(client.host, client.port)
            writer.write(head.encode())
            writers.append(writer)
        large = {"model": "tiny", "prompt": "x", "user": "y" * 100_000}
        async with asyncio.timeout(60):
            while (response := await client.post(COMPLETIONS, json=large)).status == 200:
                await asyncio.sleep(0.01)  # those above are not there yet
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
        small = {"model": "tiny", "prompt": "x"}
        assert (await client.post(COMPLETIONS, json=small)).status == 200
        for writer in writers:
            writer.transport.abort()
        async with asyncio.timeout(60):
            while (await client.post(COMPLETIONS, json=large)).status != 200:
                await asyncio.sleep(0.01)

    run(engine, scenario)
