"""What the server says passes OpenAI's published OpenAPI document (openai_schema/).

Run with the application in this process. Fields beyond OpenAI's are allowed; every field that its
document requires is there, and of the type and among the values it allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from nybble.engine import Engine

from ..client import CHAT, COMPLETIONS, HELLO, JSON, RESPONSES, Client, run

DOCUMENT = json.loads((Path(__file__).parent / "openai_schema" / "schemas.json").read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
EMBEDDINGS = "/v1/embeddings"
REF = "#/components/schemas/"


TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{% endif %}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
)


@pytest.fixture
def engine(engine: Engine) -> Engine:
    """With a template that knows tools."""
    engine.tokenizer.chat_template = TEMPLATE
    return engine


def check(name: str, body: Any) -> None:
    schema = {"$ref": REF + name, "components": DOCUMENT["components"]}
    errors = [
        f"{error.json_path}: {error.message}"
        for error in Draft202012Validator(schema).iter_errors(body)
    ]
    assert not errors, (name, errors, body)


def check_event(event: dict[str, Any]) -> None:
    """By its own schema, which tells more than the union."""
    check("ResponseStreamEvent", event)
    members = [ref["$ref"].removeprefix(REF) for ref in SCHEMAS["ResponseStreamEvent"]["anyOf"]]
    (name,) = [m for m in members if SCHEMAS[m]["properties"]["type"]["enum"] == [event["type"]]]
    check(name, event)


async def ask(client: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with client.post(path, json={"model": "tiny", **body}) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return dict(answer)


async def stream(client: Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with client.post(path, json={"model": "tiny", "stream": True, **body}) as response:
        parts = (await response.text()).strip().split("\n\n")
        assert response.status == 200, parts
    data = [part.split("data: ", 1)[1] for part in parts]
    return [json.loads(item) for item in data if item != "[DONE]"]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"day": {"enum": ["mon", "tue"]}},
                "required": ["day"],
            },
        },
    }
]
JSON_SCHEMA = {"name": "answer", "schema": {"enum": ["yes", "no"]}}
CHATS: list[dict[str, Any]] = [
    {"max_tokens": 5},
    {"max_tokens": 5, "n": 2, "logprobs": True, "top_logprobs": 2},
    {"max_tokens": 0x40, "tools": TOOLS, "tool_choice": "required"},
    {
        "max_tokens": 0x40,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
    {"response_format": {"type": "json_schema", "json_schema": JSON_SCHEMA}},
]


@pytest.mark.parametrize("options", CHATS)
def test_chat_completions(engine: Engine, options: dict[str, Any]) -> None:
    async def scenario(client: Client) -> None:
        body = {"messages": HELLO, **options}
        check("CreateChatCompletionResponse", await ask(client, CHAT, body))
        usage = {"stream_options": {"include_usage": True}}
        chunks = await stream(client, CHAT, body | usage)
        for chunk in chunks:
            check("CreateChatCompletionStreamResponse", chunk)
        assert len(chunks) > 2

    run(engine, scenario)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 2, "logprobs": 2},
        {"echo": True, "logprobs": 0},
        {"echo": True, "max_tokens": 0, "logprobs": 1},
        {"prompt": ["a", "b"], "prompt_logprobs": 1, "stream": False},
    ],
)
def test_completions(engine: Engine, options: dict[str, Any]) -> None:
    async def scenario(client: Client) -> None:
        body = {"prompt": "the lazy dog", "max_tokens": 5, **options}
        answer = await ask(client, COMPLETIONS, body)
        check("CreateCompletionResponse", _without_nulls(answer))
        if body.get("stream") is not False:
            for chunk in await stream(client, COMPLETIONS, body):
                check("CreateCompletionResponse", _without_nulls(chunk))

    run(engine, scenario)


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """The document has no null for them, but the API itself sends it: until the end of a stream for
    ``finish_reason``, and for the first token of a prompt that is echoed."""
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for values in (choice["logprobs"] or {}).values():
            if values and values[0] is None:
                del values[0]
    return body


@pytest.mark.parametrize(
    "options",
    [
        {"max_output_tokens": 16},
        {"max_output_tokens": 64, "instructions": "be brief", "metadata": {"a": "b"}},
        {"tools": [{"type": "function", **TOOLS[0]["function"]}], "tool_choice": "required"},
        {
            "tools": [{"type": "function", **TOOLS[0]["function"]}],
            "tool_choice": {"type": "function", "name": "weather"},
        },
        {"text": {"format": {"type": "json_schema", **JSON_SCHEMA}}},
    ],
)
def test_responses_and_their_events(engine: Engine, options: dict[str, Any]) -> None:
    async def scenario(client: Client) -> None:
        body = {"input": "hello", "max_output_tokens": 64, **options}
        check("Response", await ask(client, RESPONSES, body))
        events = await stream(client, RESPONSES, body)
        for event in events:
            check_event(event)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))

    run(engine, scenario)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings(engine: Engine, encoding: str) -> None:
    async def scenario(client: Client) -> None:
        body = {"input": ["a", "b"], "encoding_format": encoding}
        answer = await ask(client, EMBEDDINGS, body)
        if encoding == "base64":  # which the document forgets
            for item in answer["data"]:
                assert isinstance(item["embedding"], str)
                item["embedding"] = [0.0]
        check("CreateEmbeddingResponse", answer)

    run(engine, scenario)


def test_models(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/v1/models") as response:
            check("ListModelsResponse", await response.json())
        async with client.get("/v1/models/tiny") as response:
            check("Model", await response.json())

    run(engine, scenario)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, "/nothing"])
@pytest.mark.parametrize("data", [b"{}", b"[", b'{"model": "other", "prompt": "a", "input": "a"}'])
def test_errors(engine: Engine, path: str, data: bytes) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(path, data=data, headers=JSON) as response:
            assert response.status in (400, 404)
            check("ErrorResponse", await response.json())

    run(engine, scenario)


def test_a_stream_cut_short_ends_with_an_event_of_the_document(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        slow = {"timeout": 0.15, "ignore_eos": True}
        body = {"messages": HELLO, "max_tokens": 400, **slow}
        *_, last = await stream(client, CHAT, body)
        check("ErrorResponse", last)

    _slowed(engine)
    run(engine, scenario)


def _slowed(engine: Engine) -> None:
    import time

    run_step: Callable[..., Any] = engine._runner.run

    def slow(batch: Any) -> Any:
        time.sleep(0.01)
        return run_step(batch)

    engine._runner.run = slow  # type: ignore[method-assign]
