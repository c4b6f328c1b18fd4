"""A client of the application in this process, and what most tests send through it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from nybble.engine import Engine
from nybble.loaders.templates import TemplateRenderer
from nybble.server.app import make_app
from nybble.server.http.gate import Gate
from nybble.server.lifecycle.settings import ServerSettings

Client = TestClient[web.Request, web.Application]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES = "/v1/responses"
# One process for all tests of this one; it ends with it.
TEMPLATES = TemplateRenderer()
JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "hello"}]


def without_white_space(tokenizer: Any) -> dict[str, float]:
    """A ``logit_bias``, without which random weights fill JSON with white space."""
    texts = enumerate(tokenizer.batch_decode([[id] for id in range(len(tokenizer))]))
    return {str(id): -100.0 for id, text in texts if text.isspace()}


def run(engine: Engine, scenario: Callable[[Client], Awaitable[None]], **options: Any) -> None:
    """Run a scenario against the application in this process."""

    async def main() -> None:
        gate = options.pop("gate", None) or Gate()
        settings = ServerSettings(**{"models": ("tiny",), "max_sequences": 16, **options})
        app = make_app(engine, settings, gate, TEMPLATES)
        async with TestClient(TestServer(app)) as client:
            await scenario(client)

    asyncio.run(main())


async def refused(client: Client, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client.post(path, data=data, headers=JSON) as response:
        error = (await response.json())["error"]
        assert (response.status, set(error)) == (status, {"message", "type", "param", "code"}), (
            error
        )
        assert "\n" not in error["message"]
        return dict(error)
