"""/v1/messages as Anthropic describes it, over the same generation as chats."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from nybble.engine import Engine, Request, RequestOutput

from ..client import CHAT, HELLO, Client, run, without_white_space
from ..conftest import started_engine

MESSAGES = "/v1/messages"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% set x = '<tool_call>' %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
TOOL = {
    "name": "clock",
    "description": "The time",
    "input_schema": {
        "type": "object",
        "properties": {"zone": {"enum": ["utc", "cet"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}
BODY: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 3}


@pytest.fixture(scope="module")
def engine(tiny_model: Any) -> Iterator[Engine]:
    with started_engine(tiny_model(max_length=2048)) as engine:
        engine.tokenizer.chat_template = TEMPLATE
        yield engine


async def ask(client: Client, **options: Any) -> dict[str, Any]:
    async with client.post(MESSAGES, json={**BODY, **options}) as response:
        assert response.status == 200, await response.text()
        return dict(await response.json())


async def streamed(client: Client, **options: Any) -> list[dict[str, Any]]:
    async with client.post(MESSAGES, json={**BODY, **options, "stream": True}) as response:
        assert response.status == 200, await response.text()
        parts = (await response.text()).strip().split("\n\n")
    events = []
    for part in parts:
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events make together, as clients put it together."""
    message: dict[str, Any] = {}
    written: dict[int, str] = {}
    for event in events:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            if delta["type"] == "input_json_delta":
                text = written.get(event["index"], "") + delta["partial_json"]
                written[event["index"]] = text
            else:
                kind = delta["type"].removesuffix("_delta")
                block[kind] += delta[kind]
        elif event["type"] == "content_block_stop" and event["index"] in written:
            message["content"][event["index"]]["input"] = json.loads(written[event["index"]])
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    assert events[-1]["type"] == "message_stop"
    return message


def same(message: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one answer to the next."""
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    usage = message["usage"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"]
    shown = {k: v for k, v in message.items() if k not in ("id", "usage")}
    return {**shown, "content": content, "usage": (read, usage["output_tokens"])}


def test_an_answer_and_its_stream_are_the_same_message(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        whole = await ask(client)
        assert set(whole) == {
            *("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"),
        }
        assert (whole["type"], whole["role"], whole["model"]) == ("message", "assistant", "tiny")
        assert whole["id"].startswith("msg_")
        (block,) = whole["content"]
        assert block["type"] == "text"
        assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == ("max_tokens", 8)
        events = await streamed(client)
        assert [event["type"] for event in events][:2] == ["message_start", "content_block_start"]
        assert [event["type"] for event in events][-3:] == [
            *("content_block_stop", "message_delta", "message_stop"),
        ]
        assert same(joined(events)) == same(whole)

    run(engine, scenario)


def test_a_stop_sequence_is_named(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        text = (await ask(client))["content"][0]["text"]
        stop = text[1:3]
        answer = await ask(client, stop_sequences=["@@@", stop])
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
        assert answer["content"][0]["text"] == text[: text.index(stop)]

    run(engine, scenario)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "clock"}])
def test_tools_are_called(
    engine: Engine, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = {int(id): value for id, value in without_white_space(engine.tokenizer).items()}
    generate = engine.generate  # the API has no bias

    def unspaced(request: Request) -> AsyncGenerator[RequestOutput]:
        return generate(replace(request, params=replace(request.params, logit_bias=bias)))

    monkeypatch.setattr(engine, "generate", unspaced)

    async def scenario(client: Client) -> None:
        choice["disable_parallel_tool_use"] = True
        options = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 1000, "temperature": 0.0}
        options["thinking"] = {"type": "enabled", "budget_tokens": 2}
        whole = await ask(client, **options)
        (block,) = [each for each in whole["content"] if each["type"] == "tool_use"]
        assert block["id"].startswith("toolu_")
        assert block["name"] == "clock"
        assert whole["stop_reason"] == "tool_use"
        assert block["input"]["zone"] in ("utc", "cet")
        assert same(joined(await streamed(client, **options))) == same(whole)

    run(engine, scenario)


def test_a_tools_name_may_be_as_long_as_anthropics(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        tool = {**TOOL, "name": "x" * 128}
        block = {"type": "tool_use", "id": "t", "name": tool["name"], "input": {"zone": "utc"}}
        result = {"type": "tool_result", "tool_use_id": "t", "content": "noon"}
        turns = [
            *HELLO,
            {"role": "assistant", "content": [block]},
            {"role": "user", "content": [result]},
        ]
        choice = {"type": "tool", "name": tool["name"]}
        answer = await ask(client, tools=[tool], messages=turns, tool_choice=choice)
        assert answer["usage"]["input_tokens"] > 128
        body = {**BODY, "tools": [{**tool, "name": "x" * 129}]}
        async with client.post(MESSAGES, json=body) as response:
            assert response.status == 400
            assert "tools[0].name" in (await response.json())["error"]["message"]
        function = {"name": "x" * 65, "parameters": {}}  # OpenAI's own limit is 64
        body = {**BODY, "tools": [{"type": "function", "function": function}]}
        async with client.post(CHAT, json=body) as response:
            assert response.status == 400

    run(engine, scenario)


def test_reasoning_is_a_thinking_block(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        options = {
            "thinking": {"type": "enabled", "budget_tokens": 3},
            "output_config": {"format": {"type": "json_schema", "schema": {"const": 5}}},
            "max_tokens": 60,
        }
        whole = await ask(client, **options)
        first, second = whole["content"]
        assert (first["type"], first["signature"], bool(first["thinking"])) == (
            "thinking",
            "",
            True,
        )
        assert second == {"type": "text", "text": "5"}
        assert whole["stop_reason"] == "end_turn"
        assert same(joined(await streamed(client, **options))) == same(whole)
        options["thinking"]["display"] = "omitted"  # type: ignore[index]
        (only,) = (await ask(client, **options))["content"]
        assert only == {"type": "text", "text": "5"}

    run(engine, scenario)


def test_blocks_of_earlier_turns_reach_the_template(engine: Engine) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what time is it?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "a clock helps", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "clock", "input": {"zone": "utc"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "text", "text": "noon"}],
                    "cache_control": {"type": "ephemeral"},
                },
                {"type": "text", "text": "and in Rome?"},
            ],
        },
    ]
    shown = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat time is it?<|im_end|>\n"
        "<|im_start|>assistant\n<think>a clock helps</think>Let me see."
        '{"name": "clock", "arguments": {"zone": "utc"}}<|im_end|>\n'
        "<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>user\nand in Rome?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )

    async def scenario(client: Client) -> None:
        system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
        body = {"model": "tiny", "messages": messages, "system": system}
        async with client.post(f"{MESSAGES}/count_tokens", json=body) as response:
            assert response.status == 200, await response.text()
            expected = len(engine.tokenizer.encode(shown, add_special_tokens=False))
            assert await response.json() == {"input_tokens": expected}
        usage = (await ask(client, **body))["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected

    run(engine, scenario)


def test_an_answer_goes_on_from_where_it_was_begun(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        begun = [*HELLO, {"role": "assistant", "content": "The time is"}]
        body = {"model": "tiny", "messages": begun}
        async with client.post(f"{MESSAGES}/count_tokens", json=body) as response:
            counted = (await response.json())["input_tokens"]
        shown = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nThe time is"
        assert counted == len(engine.tokenizer.encode(shown, add_special_tokens=False))

    run(engine, scenario)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}


@pytest.mark.parametrize(
    ("options", "status", "kind", "message"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "other"}, 404, "not_found_error", "other"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            400,
            "invalid_request_error",
            "images are not supported: this server's models read text",
        ),
        (
            {"tools": [{"type": "bash_20250124", "name": "bash"}]},
            400,
            "invalid_request_error",
            "bash",
        ),
        ({"stop_sequences": ["a"] * 17}, 400, "invalid_request_error", "16"),
        ({"temperature": -1.0}, 400, "invalid_request_error", "temperature"),
        ({"colour": "red"}, 400, "invalid_request_error", "colour"),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error", "MCP"),
        (
            {"messages": [{"role": "user", "content": "fox " * 5000}]},
            400,
            "invalid_request_error",
            "tokens",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_anthropics_shape(
    engine: Engine, options: dict[str, Any], status: int, kind: str, message: str, stream: bool
) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(MESSAGES, json={**BODY, **options, "stream": stream}) as response:
            body = await response.json()
            assert (response.status, body["type"], body["error"]["type"]) == (status, "error", kind)
            assert message in body["error"]["message"]

    run(engine, scenario)


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_answer_may_be_limited_beyond_the_context_and_says_if_it_ends_there(
    engine: Engine, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Anthropic's models of 2025 on: clients name a limit without knowing the prompt."""
    monkeypatch.setattr(engine, "eos_token_ids", frozenset())
    long = [{"role": "user", "content": "fox " * 600}]

    async def scenario(client: Client) -> None:
        body = {**BODY, "messages": long, "max_tokens": 10**6, "stream": stream}
        async with client.post(MESSAGES, json=body) as response:
            text = await response.text()
            assert response.status == 200, text
        assert '"stop_reason":"model_context_window_exceeded"' in text.replace('": ', '":')

    run(engine, scenario)


def test_the_key_may_come_in_anthropics_header(engine: Engine, tmp_path: Any) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(MESSAGES, json=BODY) as response:
            assert response.status == 401
            assert (await response.json())["error"]["type"] == "authentication_error"
        async with client.post(MESSAGES, json=BODY, headers={"x-api-key": "secret"}) as response:
            assert response.status == 200

    run(engine, scenario, api_keys=("secret",))


def test_what_asks_for_nothing_is_accepted(engine: Engine) -> None:
    """As agents send it with every request."""
    kept = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}

    async def scenario(client: Client) -> None:
        plain = await ask(client, seed=1, max_tokens=8)
        for nothing in ({"edits": []}, kept):
            found = await ask(client, seed=1, max_tokens=8, context_management=nothing)
            assert same(found) == same(plain)
        adaptive = await ask(client, seed=1, max_tokens=8, thinking={"type": "adaptive"})
        assert same(adaptive) == same(plain)

    run(engine, scenario)
