"""Responses are what OpenAI's published types say, and hostile connections change nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ..client import CHAT, COMPLETIONS, HELLO, RESPONSES

CHAT_BODY = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "logprobs": True, "n": 2}
COMPLETION_BODY = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 6, "logprobs": 2}
RESPONSES_BODY = {"model": "tiny", "input": "hello", "max_output_tokens": 6}


async def post(url: str, body: dict[str, Any]) -> str:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.text()


def events(text: str) -> list[Any]:
    data = [part.split("data: ", 1)[1] for part in text.strip().split("\n\n")]
    return [json.loads(item) for item in data if item != "[DONE]"]


@pytest.mark.parametrize(
    ("path", "body", "whole", "event"),
    [
        (CHAT, CHAT_BODY, ChatCompletion, ChatCompletionChunk),
        (COMPLETIONS, COMPLETION_BODY, Completion, Completion),
        (RESPONSES, RESPONSES_BODY, Response, ResponseStreamEvent),
    ],
)
def test_bodies_and_events_are_of_the_published_types(
    server: Any, path: str, body: dict[str, Any], whole: Any, event: Any
) -> None:
    async def scenario() -> None:
        answer = json.loads(await post(server.url + path, body))
        # The one field of vLLM's that is there unasked; null says that nothing was computed.
        for each in {CHAT: [answer], COMPLETIONS: answer.get("choices")}.get(path, []):
            assert each.pop("prompt_logprobs") is None
        TypeAdapter(whole).validate_python(answer, extra="forbid")
        found = events(await post(server.url + path, {**body, "stream": True}))
        assert len(found) > 3
        for each in found:
            if whole is Completion:
                # The type has no null here, but the API itself streams it until the end.
                for choice in each["choices"]:
                    choice["finish_reason"] = choice["finish_reason"] or "stop"
            TypeAdapter(event).validate_python(each, extra="forbid")

    asyncio.run(scenario())


def test_model_objects_are_of_the_published_type(server: Any) -> None:
    async def scenario() -> None:
        url = server.url + "/v1/models/tiny"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            Model.model_validate(await response.json())

    asyncio.run(scenario())


def test_a_thousand_streams_at_once_are_each_whole(server: Any) -> None:
    async def one(session: aiohttp.ClientSession, number: int) -> tuple[int, str]:
        body = {"model": "tiny", "prompt": f"question {number % 7}", "max_tokens": 12}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True}
        async with session.post(server.url + COMPLETIONS, json=body) as response:
            assert response.status == 200
            text = await response.text()
        assert text.endswith("data: [DONE]\n\n")
        return number % 7, "".join(event["choices"][0]["text"] for event in events(text))

    async def scenario() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            answers = await asyncio.gather(*(one(session, number) for number in range(1000)))
        assert len(answers) == 1000
        assert len(set(answers)) == 7

    asyncio.run(scenario())


async def raw(server: Any, data: bytes) -> bytes:
    """What the server says to bytes on a fresh connection."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    try:
        async with asyncio.timeout(60):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a plain port
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nA\x00B: 1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_turned_away(server: Any, data: bytes) -> None:
    async def scenario() -> None:
        answer = await raw(server, data)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")), answer[:200]

    asyncio.run(scenario())


def test_who_pipelines_without_end_and_reads_nothing_is_left_waiting(server: Any) -> None:
    get = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def scenario() -> None:
        host, port = server.url.removeprefix("http://").split(":")
        # The reader is kept: without one, whatever comes would be taken.
        _reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        flood = get * 200_000  # 7.6 MB: the answers would be five times as much
        writer.write(flood)
        for _ in range(5):  # others are answered meanwhile
            assert (
                await raw(server, get.replace(b"Host", b"Connection: close\r\nHost"))
            ).startswith(b"HTTP/1.1 200")
        # Neither requests nor answers are stored up: what was not read is still on this side.
        assert writer.transport.get_write_buffer_size() > len(flood) // 4
        writer.transport.abort()

    asyncio.run(scenario())


def test_pipelined_requests_are_answered_in_order(server: Any) -> None:
    get = b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n"
    close = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    async def scenario() -> None:
        answer = await raw(server, get % b"health" + get % b"nothing" + close)
        statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"200", b"404", b"200"]

    asyncio.run(scenario())
