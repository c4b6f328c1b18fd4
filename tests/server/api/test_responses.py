"""/v1/responses through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from nybble.engine import Engine

from ..client import RESPONSES, Client, refused, run
from ..conftest import started_engine
from .test_chat import chat
from .test_tools import CLOCK, HERMES

NOT_ENFORCEABLE = {"type": "json_schema", "schema": {"type": "nope"}, "strict": True}


def respond(client: OpenAI, **options: Any) -> Any:
    defaults = {"model": "tiny", "max_output_tokens": 12, "temperature": 0}
    return client.responses.create(**{**defaults, "input": "the quick fox", **options})


def test_a_response_says_what_a_chat_says(client: OpenAI) -> None:
    answer = respond(client, instructions="be brief")
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the quick fox"},
    ]
    expected = chat(client, messages=messages, max_tokens=12)
    assert answer.output_text == expected.choices[0].message.content
    assert answer.usage.input_tokens == expected.usage.prompt_tokens
    assert answer.usage.output_tokens == expected.usage.completion_tokens
    cut = expected.choices[0].finish_reason == "length"
    assert answer.status == ("incomplete" if cut else "completed")
    assert (answer.incomplete_details is not None) == cut


def test_a_response_says_by_what_it_was_sampled(client: OpenAI, engine: Engine) -> None:
    own = {"temperature": 1.0, "top_p": 1.0, **engine.sampling_defaults}
    answer = client.responses.create(model="tiny", input="the quick fox", max_output_tokens=4)
    assert (answer.temperature, answer.top_p) == (own["temperature"], own["top_p"])
    answer = respond(client, temperature=0.25, top_p=0.5)
    assert (answer.temperature, answer.top_p) == (0.25, 0.5)


def test_a_conversation_goes_on_from_the_output_of_a_response(client: OpenAI) -> None:
    first = respond(client)
    turns: Any = [{"role": "user", "content": "the quick fox"}, *first.output]
    turns.append({"role": "user", "content": [{"type": "input_text", "text": "and then?"}]})
    messages: Any = [
        {"role": "user", "content": "the quick fox"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and then?"},
    ]
    expected = chat(client, messages=messages, max_tokens=12)
    assert respond(client, input=turns).output_text == expected.choices[0].message.content


def test_events_come_in_order_and_add_up(client: OpenAI) -> None:
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert events[0].response.output == []
    final = events[-1].response
    assert kinds[-1] == f"response.{final.status}"
    assert "".join(event.delta for event in events[4:-4]) == final.output_text
    assert final.output_text == respond(client).output_text


@pytest.mark.parametrize(
    "asked",
    [
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"include": ["message.output_text.logprobs"]},
        {"top_logprobs": 2},
    ],
)
def test_log_probabilities_are_those_of_a_chat(client: OpenAI, asked: dict[str, Any]) -> None:
    top = asked.get("top_logprobs", 0)
    messages: Any = [{"role": "user", "content": "the quick fox"}]
    said = chat(client, messages=messages, max_tokens=12, logprobs=True, top_logprobs=top)
    expected = [entry.model_dump() for entry in said.choices[0].logprobs.content]
    assert len(expected[0]["top_logprobs"]) == top

    answer = respond(client, **asked)
    assert answer.top_logprobs == top
    (part,) = answer.output[0].content
    assert [entry.model_dump() for entry in part.logprobs] == expected

    events = list(respond(client, stream=True, **asked))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    streamed = [entry.model_dump() for event in deltas for entry in event.logprobs]
    assert [entry["logprob"] for entry in streamed] == [entry["logprob"] for entry in expected]
    assert all(len(event.logprobs) > 0 for event in deltas)
    assert events[-1].response.output[0].content[0].logprobs == part.logprobs


def test_without_being_asked_for_there_are_no_log_probabilities(client: OpenAI) -> None:
    assert respond(client).output[0].content[0].logprobs == []


def test_the_clients_helper_parses_structured_output(client: OpenAI) -> None:
    class Flag(BaseModel):
        on: bool

    # Room for all the white space that the grammar allows: 40 characters in each of five places.
    parsed = client.responses.parse(
        model="tiny", input="x", text_format=Flag, max_output_tokens=400
    )
    assert isinstance(parsed.output_parsed, Flag)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": "x " * 1000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["message.everything"]}, "include[0]"),
        ({"text": {"format": NOT_ENFORCEABLE}}, "text.format"),
        ({"extra_body": {"seed": 2**63}}, "seed"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
    ],
)
def test_what_is_not_supported_is_named(
    client: OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        respond(client, **options)
    assert error.value.param == param


@pytest.fixture
def engine(tiny_model: Any) -> Iterator[Engine]:
    with started_engine(tiny_model(max_length=2048)) as engine:
        engine.tokenizer.chat_template = HERMES
        yield engine


def test_function_calls_are_items_with_events_of_their_own(engine: Engine) -> None:
    body = {
        "model": "tiny",
        "input": "what time is it",
        "tools": [{"type": "function", **CLOCK["function"]}],  # type: ignore[dict-item]
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "clock"}],
        },
        "parallel_tool_calls": False,
        "max_output_tokens": 800,
    }

    async def scenario(client: Client) -> None:
        text = await (await client.post(RESPONSES, json={**body, "stream": True})).text()
        events = [json.loads(part.split("data: ")[1]) for part in text.strip().split("\n\n")]
        final = events[-1]["response"]
        assert final["status"] == "completed"
        (item,) = final["output"]
        assert (item["type"], item["name"], item["status"]) == (
            "function_call",
            "clock",
            "completed",
        )
        assert json.loads(item["arguments"])["zone"] in ("utc", "cet")
        deltas = [e["delta"] for e in events if e["type"].endswith("arguments.delta")]
        assert "".join(deltas) == item["arguments"]
        # The result goes back with the call before it.
        result = {"type": "function_call_output", "call_id": item["call_id"], "output": "12:00"}
        again = [{"role": "user", "content": "what time is it"}, item, result]
        follow = {**body, "input": again, "tool_choice": "none", "max_output_tokens": 5}
        answer = await (await client.post(RESPONSES, json=follow)).json()
        assert answer["output"][0]["type"] == "message"

    run(engine, scenario)


def test_an_engine_that_fails_ends_the_events_with_a_failed_response(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "input": "x", "stream": True}
        async with client.post(RESPONSES, json=body) as response:
            await response.content.readline()

            def fail(*_: object) -> None:
                raise RuntimeError("the device is gone")

            monkeypatch.setattr(engine._runner, "run", fail)
            last = (await response.read()).decode().strip().split("\n\n")[-1]
        event = json.loads(last.split("data: ")[1])
        assert event["type"] == "response.failed"
        assert event["response"]["error"]["message"]
        await refused(client, RESPONSES, body, 503)

    run(engine, scenario)
