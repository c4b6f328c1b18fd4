"""What a chat template may do to the server that renders it."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from nybble.engine import Engine

from ..client import CHAT, HELLO, Client, run
from ..conftest import running_server

# Its loop has no end.
BROKEN = "{% for message in messages %}\n{{ message.content }}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_model_whose_template_hangs_answers_what_needs_none(engine: Engine) -> None:
    engine.tokenizer.chat_template = ENDLESS

    async def scenario(client: Client) -> None:
        async with asyncio.TaskGroup() as tasks:
            chat = tasks.create_task(
                client.post(CHAT, json={"model": "tiny", "messages": HELLO, "max_tokens": 2})
            )
            await asyncio.sleep(0.1)
            async with client.get("/health") as response:
                assert response.status == 200
                assert not chat.done()
        async with chat.result() as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (500, "chat_template_failed")
            assert "takes too long" in error["message"]

    run(engine, scenario)


def test_a_template_of_the_request_that_hangs_is_the_requests_fault(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "messages": HELLO, "chat_template": ENDLESS}
        async with client.post(CHAT, json=body) as response:
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, "chat_template")
            assert error["message"].startswith("the chat template of the request cannot be used")

    run(engine, scenario, trust_chat_templates=True)


def test_a_template_that_is_not_jinja_is_reported_at_the_start(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    (folder / "chat_template.jinja").write_text(BROKEN)
    told = "the model's chat template cannot be used: line 2: Unexpected end of template"
    with running_server(folder) as server:
        deadline = time.monotonic() + 60
        while told not in "".join(server.lines) and time.monotonic() < deadline:
            time.sleep(0.05)
        server.terminate()
        assert told in server.log()
