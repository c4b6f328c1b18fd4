"""Adapters that come, change and go under a running server's streams."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp

from ..client import COMPLETIONS
from ..conftest import running_server

ADMIN = {"Authorization": "Bearer root"}
ENDLESS, LONG, SHORT = 16000, 900, 24
SECONDS = 120.0  # of patience


def serve(
    folder: Path, scenario: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, None]], *more: str
) -> None:
    options = ("--admin-key", "root", "--max-lora-rank", "8", "--max-loras", "4", *more)

    async def main(url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=SECONDS)
        async with aiohttp.ClientSession(url, timeout=timeout) as client:
            await scenario(client)

    with running_server(folder, *options) as server:
        asyncio.run(main(server.url))


def body(model: str, count: int, **more: Any) -> dict[str, Any]:
    fields = {"prompt": "the quick", "max_tokens": count, "temperature": 0, "ignore_eos": True}
    return {"model": model, **fields, **more}


async def text(client: aiohttp.ClientSession, model: str, count: int) -> str | None:
    """None where there is no such model."""
    async with client.post(COMPLETIONS, json=body(model, count)) as response:
        answer = await response.json()
        assert response.status in (200, 404), answer
        return answer["choices"][0]["text"] if response.status == 200 else None


async def change_during(
    client: aiohttp.ClientSession, model: str, change: Callable[[], Awaitable[None]], expected: str
) -> None:
    """``change`` happens after the first word of a stream, which goes on as ``expected``."""
    found, changed = "", False
    async with client.post(COMPLETIONS, json=body(model, ENDLESS, stream=True)) as response:
        assert response.status == 200
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            assert "error" not in event, event
            found += event["choices"][0]["text"]
            if found and not changed:
                await change()
                assert await running(client) >= 1, "the stream ended before the change did"
                changed = True
            if len(found) >= len(expected):
                break  # which ends the request
    assert found[: len(expected)] == expected


async def running(client: aiohttp.ClientSession) -> float:
    async with client.get("/metrics") as response:
        match = re.search(r"^nybble_sequences_running (\S+)$", await response.text(), re.MULTILINE)
    assert match is not None
    return float(match[1])


async def admin(client: aiohttp.ClientSession, path: str, **fields: Any) -> None:
    async with client.post(path, json=fields, headers=ADMIN) as response:
        assert response.status == 200, await response.text()


def test_streams_finish_on_the_version_they_began_with(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        shutil.copytree(tiny_adapter(seed=seed), tmp_path / name)

    async def scenario(client: aiohttp.ClientSession) -> None:
        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        await admin(client, load, lora_name="two", lora_path="two")
        await admin(client, load, lora_name="a", lora_path="one")
        one, two = await text(client, "a", LONG), await text(client, "two", LONG)
        assert one is not None
        assert two is not None
        short = await text(client, "two", SHORT)
        assert short != await text(client, "a", SHORT)

        async def replace() -> None:
            await admin(client, load, lora_name="a", lora_path="two", load_inplace=True)
            assert await text(client, "a", SHORT) == short

        await change_during(client, "a", replace, one)

        async def remove() -> None:
            await admin(client, unload, lora_name="a")
            assert await text(client, "a", SHORT) is None

        await change_during(client, "a", remove, two)

    # A state of its own: the cache may have one of an earlier run in a folder of this name.
    options = ("--lora-root", str(tmp_path), "--lora-state", str(tmp_path / "state.json"))
    serve(tiny_model(max_length=16384), scenario, *options)


def test_a_watched_folder_is_followed_under_traffic(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Answers are those of no adapter yet, of the first version, of the second, of none again."""
    watched = tmp_path / "watched"
    watched.mkdir()

    async def scenario(client: aiohttp.ClientSession) -> None:
        seen: list[str | None] = []

        async def traffic() -> None:
            while True:
                answer = await text(client, "a", SHORT)
                if seen[-1:] != [answer]:
                    seen.append(answer)
                await asyncio.sleep(0.01)

        async def changed(count: int) -> None:
            while len(seen) < count:
                assert not requests.done(), requests
                await asyncio.sleep(0.02)

        requests = asyncio.create_task(traffic())
        async with asyncio.timeout(SECONDS):
            await changed(1)
            shutil.copytree(tiny_adapter(seed=1), watched / "a")
            await changed(2)
            shutil.copytree(tiny_adapter(seed=2), watched / "a", dirs_exist_ok=True)
            await changed(3)
            shutil.rmtree(watched / "a")
            await changed(4)
        requests.cancel()
        base = await text(client, "tiny", SHORT)
        assert seen[0] is None
        assert seen[3] is None
        assert len({base, None, *seen[1:3]}) == 4

    serve(tiny_model(), scenario, "--lora-watch", str(watched))


def test_the_start_says_who_may_load_adapters(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    said = []
    root = ("--lora-root", str(tmp_path), "--lora-state", str(tmp_path / "state.json"))
    for options in (root, (*root, "--admin-key", "secret"), ("--admin-key", "secret")):
        with running_server(tiny_model(), *options) as server:
            server.terminate()
            said.append(server.log())
    for log, warned, told in zip(said, (True, False, False), (False, True, False), strict=True):
        assert ("--lora-root is given without --admin-key" in log) == warned, log
        line = f"Loading   adapters below {tmp_path}, by POST /v1/load_lora_adapter with the admin"
        assert (line in log) == told, log
