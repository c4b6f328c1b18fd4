"""The official client: sync and async, streams, and its helpers for parsed answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import pytest
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from .conftest import Server

HELLO: Any = [{"role": "user", "content": "hello"}]


class Answer(BaseModel):
    verdict: Literal["yes", "no"]
    sure: bool


class Weather(BaseModel):
    """The weather of a day."""

    day: Literal["monday", "tuesday"]


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


def test_a_chat_whole_and_streamed_is_the_same(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 0}
    whole = client.chat.completions.create(max_completion_tokens=12, **options)
    chunks = client.chat.completions.create(max_completion_tokens=12, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_parse_gives_an_object(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Answer)
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_a_streamed_object_is_parsed_too(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, response_format=Answer
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Answer)


def test_tool_calls_are_parsed(client: OpenAI) -> None:
    tools: Any = [pydantic_function_tool(Weather)]
    answer = client.chat.completions.parse(
        model="tiny", messages=HELLO, tools=tools, tool_choice="required"
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, Weather)


def test_a_tools_result_can_be_sent_back(client: OpenAI) -> None:
    tools: Any = [pydantic_function_tool(Weather)]
    first = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    message = first.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}
    second = client.chat.completions.create(
        model="tiny", messages=[*HELLO, message, result], tools=tools, max_tokens=8
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_responses_are_parsed_and_streamed(client: OpenAI) -> None:
    answer = client.responses.parse(model="tiny", input="hello", text_format=Answer)
    assert isinstance(answer.output_parsed, Answer)
    with client.responses.stream(model="tiny", input="hello", text_format=Answer) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    assert isinstance(final.output_parsed, Answer)
    assert final.usage is not None


def test_a_response_cut_short_is_incomplete(client: OpenAI) -> None:
    stream = client.responses.create(model="tiny", input="?", max_output_tokens=16, stream=True)
    *_, last = stream
    if last.type != "response.completed":
        assert last.type == "response.incomplete"
        assert last.response.incomplete_details is not None
        assert last.response.incomplete_details.reason == "max_output_tokens"


def test_a_response_goes_on_from_its_own_output(client: OpenAI) -> None:
    tool: Any = {
        "type": "function",
        "name": "weather",
        # As OpenAI asks of strict tools; random weights would find no end to further properties.
        "parameters": Weather.model_json_schema() | {"additionalProperties": False},
        "strict": True,
    }
    first = client.responses.create(
        model="tiny", input=HELLO, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    call = first.output[0]
    assert call.type == "function_call"
    assert json.loads(call.arguments)["day"] in ("monday", "tuesday")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    second = client.responses.create(
        model="tiny", input=[*HELLO, *first.output, output], max_output_tokens=16
    )
    assert second.output


def test_embeddings_come_as_numbers(client: OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=["hello", "world"])
    assert [len(item.embedding) for item in answer.data] == [128, 128]
    assert sum(number**2 for number in answer.data[0].embedding) == pytest.approx(1, abs=1e-4)


def test_the_asynchronous_client_runs_many_at_once(server: Server) -> None:
    async def scenario() -> None:
        async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=f"{number}", max_tokens=8, stream=True, temperature=0
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            first = await asyncio.gather(*map(one, range(20)))
            assert first == await asyncio.gather(*map(one, range(20)))
            models = [model.id async for model in client.models.list()]
            assert models == ["tiny"]

    asyncio.run(scenario())
