"""Reasoning in the API: split, streamed, limited, left out, and given back with the next turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from nybble.engine import Engine
from nybble.server.api.output.dialect import Dialects

from ..client import CHAT, COMPLETIONS, HELLO, RESPONSES, Client, refused, run
from ..conftest import started_engine
from .test_openai_schema import check_event

# As Qwen3's: what was thought before the last question is left out, and the answer begins inside.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and not loop.first %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def engine(tiny_model: Any) -> Iterator[Engine]:
    with started_engine(tiny_model(max_length=2048)) as engine:
        engine.tokenizer.chat_template = THINKS
        yield engine


# Five tokens of anything, then an answer that is certain.
BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": HELLO,
    "thinking_token_budget": 5,
    "guided_regex": "yes or no",
    "max_tokens": 60,
    "seed": 1,
}


async def ask(client: Client, **options: Any) -> dict[str, Any]:
    async with client.post(CHAT, json={**BODY, **options}) as response:
        assert response.status == 200, await response.text()
        return dict(await response.json())


def test_reasoning_has_a_field_of_its_own(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        answer = await ask(client)
        message = answer["choices"][0]["message"]
        assert message["content"] == "yes or no"
        assert message["reasoning"] == message["reasoning_content"]
        assert message["reasoning"]
        assert "think" not in message["reasoning"]
        usage = answer["usage"]
        marker = len(engine.tokenizer.encode("</think>", add_special_tokens=False))
        # The last of its characters may have more bytes than the budget has tokens.
        assert 5 <= usage["completion_tokens_details"]["reasoning_tokens"] - marker < 9

    run(engine, scenario)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_has_the_same_reasoning_and_content(engine: Engine, n: int) -> None:
    async def scenario(client: Client) -> None:
        options = {"stream_options": {"include_usage": True}, "logprobs": True, "n": n}
        whole = await ask(client, n=n, logprobs=True)
        async with client.post(CHAT, json={**BODY, **options, "stream": True}) as response:
            text = await response.text()
        events = [json.loads(line[6:]) for line in text.strip().split("\n\n")[:-1]]
        for index in range(n):
            chunks = [c for e in events for c in e["choices"] if c["index"] == index]
            deltas = [chunk["delta"] for chunk in chunks]
            message = whole["choices"][index]["message"]
            for name in ("content", "reasoning", "reasoning_content"):
                assert "".join(d.get(name) or "" for d in deltas) == message[name]
            # Every token has its logprobs, of reasoning too.
            told = [t for c in chunks if c["logprobs"] for t in c["logprobs"]["content"]]
            expected = whole["choices"][index]["logprobs"]["content"]
            assert [t["token"] for t in told] == [t["token"] for t in expected]
        assert events[-1]["usage"] == {
            **whole["usage"],
            "prompt_tokens_details": events[-1]["usage"]["prompt_tokens_details"],
        }

    run(engine, scenario)


def test_logprobs_are_those_of_all_tokens_of_reasoning_and_calls_too(engine: Engine) -> None:
    """As in vLLM: in the order in which they were generated, with the markers between them."""
    parameters = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    calls = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    shown = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<tool_call>"
    engine.tokenizer.chat_template = shown + THINKS

    async def scenario(client: Client) -> None:
        body = {**BODY, **calls, "guided_regex": None, "logprobs": True, "top_logprobs": 1}
        # Random weights would fill the answer with white space.
        spaces = engine.tokenizer.convert_tokens_to_ids(["Ġ", "Ċ", "ĉ"])
        body |= {"max_tokens": 800, "logit_bias": {str(space): -100 for space in spaces}}
        async with client.post(CHAT, json=body) as response:
            whole = await response.json()
        assert response.status == 200, whole
        (choice,) = whole["choices"]
        message, told = choice["message"], choice["logprobs"]["content"]
        assert choice["finish_reason"] == "tool_calls"
        assert (message["content"], len(message["tool_calls"])) == (None, 1)
        text = b"".join(bytes(entry["bytes"]) for entry in told).decode(errors="replace")
        thought, _, rest = text.partition("</think>")
        assert thought.strip() == message["reasoning"].strip() != ""
        assert rest.strip().startswith("<tool_call>")
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": "x"}
        # The grammar ends the answer, without a token of its own, of which there would be none.
        assert len(told) == whole["usage"]["completion_tokens"]
        for entry in told:
            assert entry["logprob"] <= 0
            assert len(entry["top_logprobs"]) == 1

        async with client.post(CHAT, json={**body, "stream": True}) as response:
            events = (await response.text()).strip().split("\n\n")[:-1]
        chunks = [choice for event in events for choice in json.loads(event[6:])["choices"]]
        entries = [
            (chunk["delta"], entry)
            for chunk in chunks
            for entry in (chunk["logprobs"] or {"content": []})["content"]
        ]
        assert [entry["token"] for _, entry in entries] == [entry["token"] for entry in told]
        values = [[entry["logprob"] for entry in each] for each in (told, [e for _, e in entries])]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
        # They come with their text: those of reasoning before any of a call.
        kinds = [next(iter(delta.keys() - {"reasoning_content"}), "") for delta, _ in entries]
        assert kinds.index("tool_calls") > kinds.index("reasoning")
        assert "reasoning" not in kinds[kinds.index("tool_calls") :]

    run(engine, scenario)
    engine.tokenizer.chat_template = THINKS


def test_reasoning_can_be_left_out_or_left_in(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        hidden = (await ask(client, include_reasoning=False))["choices"][0]["message"]
        assert hidden["content"] == "yes or no"
        assert "reasoning" not in hidden
        for options in ({"separate_reasoning": False}, {"reasoning_format": "none"}):
            message = (await ask(client, **options))["choices"][0]["message"]
            assert message["content"].partition("</think>")[2].strip() == "yes or no"
            assert "reasoning" not in message

    run(engine, scenario)


def test_without_thinking_the_answer_begins_at_once(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for options in (
            {"reasoning_effort": "none"},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ):
            answer = await ask(client, **options)
            assert answer["choices"][0]["message"]["content"] == "yes or no"
            assert "reasoning" not in answer["choices"][0]["message"]
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0

    run(engine, scenario)


def test_an_answer_cut_off_inside_its_reasoning_has_no_content(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        answer = await ask(client, max_tokens=3)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == ""
        assert choice["message"]["reasoning"]

    run(engine, scenario)


def test_the_template_decides_what_of_earlier_reasoning_is_shown(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for name in ("reasoning", "reasoning_content"):
            messages = [*HELLO, {"role": "assistant", "content": "4", name: "2 and 2"}, *HELLO]
            async with client.post("/tokenize", json={"messages": messages}) as response:
                tokens = (await response.json())["tokens"]
            assert "<think>2 and 2</think>4" in engine.tokenizer.decode(tokens)

    run(engine, scenario)


def test_a_format_that_is_named_or_switched_off(engine: Engine) -> None:
    async def off(client: Client) -> None:
        error = await refused(client, CHAT, BODY)
        assert error["param"] == "thinking_token_budget"
        assert "--reasoning-parser" in error["message"]
        body = {**BODY, "thinking_token_budget": None}
        async with client.post(CHAT, json=body) as response:
            message = (await response.json())["choices"][0]["message"]
        assert message["content"] == "yes or no"

    run(engine, off, dialects=Dialects("none"))

    async def refused_elsewhere(client: Client) -> None:
        body = {"model": "tiny", "prompt": "a", "thinking_token_budget": 5}
        assert (await refused(client, COMPLETIONS, body))["param"] == "thinking_token_budget"

    run(engine, refused_elsewhere)


def test_responses_have_reasoning_items(engine: Engine) -> None:
    # Without a budget the model reasons until the limit.
    body = {"model": "tiny", "input": "hello", "max_output_tokens": 6, "seed": 1, "stream": True}

    async def scenario(client: Client) -> None:
        async with client.post(RESPONSES, json=body) as response:
            lines = (await response.text()).strip().split("\n\n")
        events = [json.loads(line.split("data: ", 1)[1]) for line in lines]
        for event in events:
            TypeAdapter(ResponseStreamEvent).validate_python(event, extra="forbid")
            check_event(event)
        kinds = [event["type"] for event in events]
        assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
        text = "".join(e["delta"] for e in events if e["type"] == "response.reasoning_text.delta")
        (item,) = events[-1]["response"]["output"]
        assert (item["type"], item["summary"], item["status"]) == ("reasoning", [], "incomplete")
        assert item["content"] == [{"type": "reasoning_text", "text": text}]
        assert events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] == 6
        # It may be sent back with the next question.
        again = [{"role": "user", "content": "hello"}, item, {"role": "user", "content": "and?"}]
        async with client.post(RESPONSES, json={**body, "input": again, "stream": False}) as answer:
            assert answer.status == 200, await answer.text()

    run(engine, scenario)
