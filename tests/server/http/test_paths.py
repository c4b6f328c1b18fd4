"""A path is found however a client has put it together from a base URL."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import ClientSession
from yarl import URL

from nybble.engine import Engine

from ..client import CHAT, HELLO, Client, run

BODY = {"model": "tiny", "messages": HELLO, "max_tokens": 2}


def raw(client: Client, path: str) -> URL:
    return URL(f"http://{client.host}:{client.port}{path}", encoded=True)


@pytest.mark.parametrize(
    "path", ["/v1//chat/completions", "//v1/chat/completions", "/v1/chat//completions/"]
)
def test_slashes_too_many_are_one(engine: Engine, path: str) -> None:
    async def scenario(client: Client) -> None:
        async with ClientSession() as session:
            async with session.post(raw(client, path), json=BODY) as response:
                assert response.status == 200, await response.text()
            async with session.get(raw(client, path)) as response:
                assert (response.status, response.headers["Allow"]) == (405, "POST")
            async with session.get(raw(client, "//v1//nothing")) as response:
                assert response.status == 404
            async with session.get(raw(client, "//v1/models/?x=1")) as response:
                assert (await response.json())["object"] == "list"

    run(engine, scenario)


async def raw_answer(client: Client, request: str, then: str = "") -> tuple[str, str]:
    """What comes at first, and what comes after ``then`` until the connection ends."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(request.encode())
    first = (await reader.readuntil(b"\r\n\r\n")).decode()
    writer.write(then.encode())
    rest = (await reader.read()).decode()
    writer.close()
    return first, rest


def test_old_and_careful_clients_are_answered(engine: Engine) -> None:
    """HTTP/1.0 as some load balancers speak it, HEAD as probes send it, Expect as curl does."""
    body = json.dumps(BODY)
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"

    async def scenario(client: Client) -> None:
        first, rest = await raw_answer(client, f"POST {CHAT} HTTP/1.0\r\n{head}\r\n{body}")
        assert first.startswith("HTTP/1.0 200 ")
        assert json.loads(rest)["choices"]

        careful = f"POST {CHAT} HTTP/1.1\r\n{head}Expect: 100-continue\r\nConnection: close\r\n\r\n"
        first, rest = await raw_answer(client, careful, then=body)
        assert first.startswith("HTTP/1.1 100 ")
        assert rest.startswith("HTTP/1.1 200 ")

        async with client.head("/health") as response:
            assert (response.status, await response.read()) == (200, b"")

    run(engine, scenario)


def test_keys_are_asked_for_whatever_the_spelling(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        async with ClientSession() as session:
            for path in ("//v1/models", "/v1//models/", "/llm/v1/models", "//health/x"):
                async with session.get(raw(client, path)) as response:
                    assert response.status == 401, path
            for path in ("//health", "/llm", "/llm/"):
                async with session.get(raw(client, path)) as response:
                    assert response.status == 200

    run(engine, scenario, api_keys=["secret"], root_path="/llm")


def test_a_prefix_that_a_proxy_leaves_is_not_looked_at(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for path in (CHAT, "/llm" + CHAT, "/llm/" + CHAT):
            async with client.session.post(raw(client, path), json=BODY) as response:
                assert response.status == 200, path
        for page in ("/llm/", "/llm"):  # the second leads to the first
            async with client.get(page) as response:
                assert (response.content_type, response.url.path) == ("text/html", "/llm/")
        async with client.get("/llmx/v1/models") as response:
            assert response.status == 404
        async with client.get("/other/v1/models") as response:
            assert response.status == 404

    run(engine, scenario, root_path="/llm")
