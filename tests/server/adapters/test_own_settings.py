"""An adapter's own chat template and generation config."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nybble.engine import AdapterConfig, AdapterError, Engine
from nybble.loaders import open_checkpoint

from ..client import Client, run
from ..conftest import CONFIG

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]: {{ message['content'] }}\n{% endfor %}"
    "[answer]:"
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture
def folder(tiny_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_adapter(), tmp_path / "adapter"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"do_sample": True, "temperature": 0.25, "top_k": 3, "eos_token_id": [2, 300]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def start(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    engines = []

    def build(**settings: Any) -> Engine:
        config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=8, **settings))
        engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
        engines.append(engine)
        engine.start()
        return engine

    yield build
    for engine in engines:
        engine.stop()


async def prompt(client: Client, engine: Engine, path: str, body: dict[str, Any]) -> str:
    async with client.post(path, json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    return str(engine.tokenizer.decode(answer["tokens"]))


def test_requests_to_an_adapter_get_its_template_and_its_settings(
    start: Callable[..., Engine], folder: Path, tiny_adapter: Callable[..., Path]
) -> None:
    engine = start()
    info = engine.load_adapter("own", str(folder))
    assert (info.own_template, info.sampling) == (True, {"temperature": 0.25, "top_k": 3})
    plain = engine.load_adapter("plain", str(tiny_adapter()))
    assert (plain.own_template, plain.sampling) == (False, None)
    assert plain.version != info.version
    assert engine.defaults_for("own") == {"temperature": 0.25, "top_k": 3}
    assert engine.defaults_for("plain") == engine.defaults_for(None) == engine.sampling_defaults
    messages = [{"role": "user", "content": "hi"}]

    async def scenario(client: Client) -> None:
        shown = {}
        for model in ("tiny", "plain", "own"):
            body = {"model": model, "messages": messages}
            shown[model] = await prompt(client, engine, "/tokenize", body)
            chat = {**body, "max_tokens": 4, "logprobs": True}
            async with client.post("/v1/chat/completions", json=chat) as response:
                used = (await response.json())["usage"]["prompt_tokens"]
            assert used == len(engine.tokenizer(shown[model])["input_ids"])
            async with client.post("/v1/messages/count_tokens", json=body) as response:
                assert (await response.json())["input_tokens"] == used
            named = {**body, "model": "tiny", "adapter": None if model == "tiny" else model}
            async with client.post("/v1/messages/count_tokens", json=named) as response:
                assert (await response.json())["input_tokens"] == used, named
        named["adapter"] = "nobody"
        async with client.post("/v1/messages/count_tokens", json=named) as response:
            assert response.status == 404
        assert shown["own"] == "[user]: hi\n[answer]:"
        assert (
            shown["plain"]
            == shown["tiny"]
            == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        )

    run(engine, scenario)


def test_its_end_tokens_end_its_answers(
    start: Callable[..., Engine],
    folder: Path,
    tiny_adapter: Callable[..., Path],
    reference: Any,
) -> None:
    engine = start()
    engine.load_adapter("plain", str(tiny_adapter()))
    asked = range(3, 20)
    (*_, said) = reference.alone(engine, asked, 8, adapter="plain", ignore_eos=False)
    settings = {"eos_token_id": said}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    engine.load_adapter("own", str(folder))
    whole = reference.alone(engine, asked, 12, adapter="plain", ignore_eos=False)
    ended = reference.alone(engine, asked, 12, adapter="own", ignore_eos=False)
    assert ended == whole[: whole.index(said) + 1] != whole


def test_they_can_be_switched_off(start: Callable[..., Engine], folder: Path) -> None:
    (folder / "generation_config.json").write_text("broken")
    engine = start(own_settings=False)
    info = engine.load_adapter("own", str(folder))
    assert (info.own_template, info.sampling) == (False, None)
    assert engine.chat_templates_of("own") is None


def test_several_templates_are_chosen_from_as_the_models_are(
    start: Callable[..., Engine], folder: Path
) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    engine = start()
    engine.load_adapter("own", str(folder))
    body = {"model": "own", "messages": [{"role": "user", "content": "hi"}]}

    async def scenario(client: Client) -> None:
        for tools, status in ((None, 400), (TOOLS, 400)):
            # Templates that leave the message out are refused, and the error shows which it was.
            async with client.post("/tokenize", json={**body, "tools": tools}) as response:
                assert response.status == status

    run(engine, scenario)
    assert engine.chat_templates_of("own") == {"default": "D", "tool_use": "T"}


@pytest.mark.parametrize(
    ("template", "status", "message"),
    [
        ("{{ raise_exception('only in verse') }}", 400, "refuses these messages: only in verse"),
        pytest.param(
            "{{ messages[0].content | nothing }}",
            400,
            "is not valid: line 1: No filter named",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "{% for m in %}",
            400,
            "is not valid: line 1: Expected an expression",
            marks=pytest.mark.slow,
        ),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            500,
            "cannot be used: ",
        ),
        ({"rag": "{{ messages }}", "tool_use": "{{ messages }}"}, 400, "cannot be used: "),
    ],
)
def test_its_failing_template_is_told_as_its_own(
    start: Callable[..., Engine], folder: Path, template: Any, status: int, message: str
) -> None:
    (folder / "chat_template.jinja").unlink()
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    engine = start()
    engine.load_adapter("own", str(folder))

    async def scenario(client: Client) -> None:
        body = {"model": "own", "messages": [{"role": "user", "content": "hi"}]}
        for path in ("/v1/chat/completions", "/tokenize")[: 1 if status == 500 else 2]:
            async with client.post(path, json=body) as response:
                error = (await response.json())["error"]["message"]
                assert response.status == status, error
            assert "of adapter 'own'" in error
            assert message in error
            assert "tiny" not in error
            async with client.post(path, json={**body, "model": "tiny"}) as response:
                assert response.status == 200

    run(engine, scenario)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "{", "generation_config.json"),
        ("generation_config.json", '{"do_sample": true, "top_p": 3}', "top_p"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature is 'hot'"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id in generation_config"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is neither a text nor"),
    ],
)
def test_what_is_wrong_with_them_is_said_when_the_adapter_is_loaded(
    start: Callable[..., Engine], folder: Path, file: str, content: str, message: str
) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / file).write_text(content)
    engine = start()
    with pytest.raises(AdapterError, match=re.escape(message)):
        engine.load_adapter("own", str(folder))
    assert engine.adapter("own") is None
