"""The kinds of requests of a soak test: what each sends, and which answers it accepts."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

# A kind of request: sends one and returns its outcome, or raises Unexpected.
Kind = Callable[["Target", random.Random], Awaitable[str]]

_WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"),
    *("def", "return", "value", "for", "item", "in", "list", "print"),
)
_SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["fox", "dog"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": _SCHEMA}}


class Unexpected(Exception):
    """An answer that a client should not get."""


@dataclass
class Target:
    """The server under test.

    keys: API keys, by tenant.
    admin: the admin key, for adapters.
    adapters: those that are loaded and unloaded during the run.
    """

    session: aiohttp.ClientSession
    origin: str
    model: str
    keys: Mapping[str, str]
    admin: str
    adapters: tuple[str, ...]

    def post(
        self, path: str, body: Any, *, tenant: str = "plain"
    ) -> aiohttp.client._RequestContextManager:
        headers = {
            "Authorization": f"Bearer {self.keys[tenant]}",
            "Content-Type": "application/json",
        }
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.session.post(self.origin + path, data=data, headers=headers)

    async def administer(self, path: str, body: Any) -> int:
        headers = {"Authorization": f"Bearer {self.admin}"}
        async with self.session.post(self.origin + path, json=body, headers=headers) as response:
            await response.read()
            return response.status


def text(rng: random.Random, most: int = 40) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, most)))


def _sampling(rng: random.Random) -> dict[str, Any]:
    extra: dict[str, Any] = {"max_tokens": rng.randint(1, 40)}
    if rng.random() < 0.5:
        extra |= {"temperature": rng.choice([0, 0.7, 1.3]), "top_p": 0.9, "seed": rng.randint(0, 9)}
    if rng.random() < 0.3:
        extra |= {"stop": [rng.choice(_WORDS)], "frequency_penalty": 0.5}
    if rng.random() < 0.3:
        extra |= {"n": rng.randint(2, 3)}
    return extra


def completion_body(target: Target, rng: random.Random) -> dict[str, Any]:
    extra = {"logprobs": 2} if rng.random() < 0.2 else {}
    return {"model": target.model, "prompt": text(rng), **extra, **_sampling(rng)}


def chat_body(target: Target, rng: random.Random) -> dict[str, Any]:
    messages = [{"role": "user", "content": text(rng)}]
    return {"model": target.model, "messages": messages, **_sampling(rng)}


async def _whole(target: Target, path: str, body: Any, *also: int, tenant: str = "plain") -> str:
    """Send a request whose answer is 200, or one of the other statuses."""
    async with target.post(path, body, tenant=tenant) as response:
        answer = await response.read()
        if response.status == 200:
            json.loads(answer)
        elif response.status not in also:
            raise Unexpected(f"{path}: {response.status} {answer[:300]!r}")
        elif response.status == 429 and "Retry-After" not in response.headers:
            raise Unexpected(f"{path}: 429 without Retry-After")
        return str(response.status)


async def completion(target: Target, rng: random.Random) -> str:
    return await _whole(target, "/v1/completions", completion_body(target, rng))


async def chat(target: Target, rng: random.Random) -> str:
    return await _whole(target, "/v1/chat/completions", chat_body(target, rng))


async def stream(target: Target, rng: random.Random) -> str:
    path, body = rng.choice(
        [
            ("/v1/completions", completion_body(target, rng)),
            ("/v1/chat/completions", chat_body(target, rng)),
        ]
    )
    async with target.post(path, body | {"stream": True}) as response:
        events = (await response.read()).strip().split(b"\n\n")
        if response.status != 200 or events[-1] != b"data: [DONE]":
            raise Unexpected(f"{path}, streamed: {response.status} {events[-1][:300]!r}")
    return "200"


async def cancelled(target: Target, rng: random.Random) -> str:
    """Read a few events, then disconnect."""
    body = completion_body(target, rng) | {"stream": True, "max_tokens": 200, "ignore_eos": True}
    async with target.post("/v1/completions", body) as response:
        if response.status != 200:
            raise Unexpected(f"a stream: {response.status}")
        for _ in range(rng.randint(1, 4)):
            await response.content.readline()
        response.close()
    return "left"


async def disconnected(target: Target, rng: random.Random) -> str:
    """Send a request, or half of one, and close the connection without reading."""
    host, _, port = target.origin.removeprefix("http://").rpartition(":")
    body = json.dumps(chat_body(target, rng) | {"max_tokens": 200, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        f"Authorization: Bearer {target.keys['plain']}\r\n\r\n"
    ).encode()
    whole = head + body
    sent = whole if rng.random() < 0.6 else whole[: rng.randint(1, len(whole))]
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    await writer.drain()
    await asyncio.sleep(rng.random() * 0.1)
    writer.transport.abort()
    return "left"


async def guided(target: Target, rng: random.Random) -> str:
    kinds: list[dict[str, Any]] = [
        {"guided_choice": ["fox", "dog"]},
        {"guided_regex": "[a-z]{1,9}"},
        {"guided_regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"},
        {"guided_json": _SCHEMA},
        {"guided_grammar": 'start: "a" | "b" start'},
    ]
    body = {"model": target.model, "prompt": text(rng), "max_tokens": 30, **rng.choice(kinds)}
    return await _whole(target, "/v1/completions", body)


async def tool_call(target: Target, rng: random.Random) -> str:
    choice = rng.choice(["auto", "required"])
    body = chat_body(target, rng) | {"tools": [_TOOL], "tool_choice": choice, "n": 1}
    return await _whole(target, "/v1/chat/completions", body | {"stream": False})


async def adapter(target: Target, rng: random.Random) -> str:
    """Ask for an adapter that may or may not be loaded at the moment."""
    body = completion_body(target, rng) | {"model": rng.choice(target.adapters)}
    return await _whole(target, "/v1/completions", body, 404, 400)


async def adapter_change(target: Target, rng: random.Random) -> str:
    name = rng.choice(target.adapters)
    if rng.random() < 0.6:
        body = {"lora_name": name, "lora_path": name, "load_inplace": True}
        status = await target.administer("/v1/load_lora_adapter", body)
    else:
        status = await target.administer("/v1/unload_lora_adapter", {"lora_name": name})
    if status not in (200, 404):
        raise Unexpected(f"administration of adapters: {status}")
    return str(status)


async def hurried(target: Target, rng: random.Random) -> str:
    body = completion_body(target, rng) | {"timeout": rng.choice([0.01, 0.05, 0.2])}
    return await _whole(target, "/v1/completions", body, 504)


async def limited(target: Target, rng: random.Random) -> str:
    """A tenant which sends more than its rate limit allows."""
    return await _whole(target, "/v1/completions", completion_body(target, rng), 429, tenant="acme")


async def other_endpoints(target: Target, rng: random.Random) -> str:
    path, body = rng.choice(
        [
            ("/v1/embeddings", {"model": target.model, "input": [text(rng), text(rng)]}),
            ("/v1/responses", {"model": target.model, "input": text(rng), "max_output_tokens": 9}),
            ("/tokenize", {"prompt": text(rng, 2000)}),
            ("/detokenize", {"tokens": [5, 6, 7]}),
        ]
    )
    return await _whole(target, path, body)


async def bad(target: Target, rng: random.Random) -> str:
    """Send something that must be refused with a 4xx."""
    model = target.model
    bodies: list[Any] = [
        b"{",
        b'{"a": NaN}',
        b"[" * 50_000,
        b" " * (1 << 20),
        {"model": model},
        {"model": "nobody", "prompt": "x"},
        {"model": model, "prompt": "x", "unknown": 1},
        {"model": model, "prompt": [10**9]},
        {"model": model, "prompt": "word " * 100_000},
        {"model": model, "prompt": "x", "max_tokens": -1},
        {"model": model, "prompt": "x", "stop": ["y"] * 99},
        {"model": model, "prompt": "x", "guided_regex": "("},
        {"model": model, "prompt": "x", "guided_json": {"type": "nonsense"}},
    ]
    async with target.post("/v1/completions", rng.choice(bodies)) as response:
        answer = await response.read()
        if not 400 <= response.status < 500:
            raise Unexpected(f"a bad request: {response.status} {answer[:300]!r}")
        return str(response.status)


KINDS: dict[Kind, int] = {
    completion: 6,
    chat: 5,
    stream: 8,
    cancelled: 3,
    disconnected: 2,
    guided: 3,
    tool_call: 2,
    adapter: 5,
    adapter_change: 2,
    hurried: 2,
    limited: 2,
    other_endpoints: 3,
    bad: 3,
}
