"""Anthropic's own client: messages, streams, tools, counts and errors."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

HELLO: Any = [{"role": "user", "content": "hello"}]
CLOCK: Any = {
    "name": "clock",
    "description": "The time in a zone",
    "input_schema": {
        "type": "object",
        "properties": {"zone": {"type": "string", "enum": ["utc", "cet"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(server: Any) -> anthropic.Anthropic:
    url = server.url.removesuffix("/v1")
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def ask(**options: Any) -> Any:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 8, **options}


def test_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ask(system="Be brief.", stop_sequences=["@@@"]))
    (block,) = message.content
    assert isinstance(block, anthropic.types.TextBlock)
    assert message.stop_reason in ("max_tokens", "end_turn")
    assert message.usage.output_tokens <= 8


def test_a_stream_makes_the_same_kind_of_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ask()) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    (block,) = message.content
    assert isinstance(block, anthropic.types.TextBlock)
    assert block.text == text
    assert message.usage.output_tokens > 0


def test_the_client_keeps_the_counts_of_drafts(client: anthropic.Anthropic) -> None:
    asked = ask(max_tokens=48, extra_body={"temperature": 0})
    with client.messages.stream(**asked) as stream:
        (ended,) = (event for event in stream if event.type == "message_delta")
    for usage in (client.messages.create(**asked).usage, ended.usage):
        drafts: Any = (usage.model_extra or {})["draft_tokens_details"]
        assert drafts["draft_tokens"] >= drafts["accepted_draft_tokens"] > 0


def test_a_tool_is_called_and_its_result_sent_back(client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "clock", "disable_parallel_tool_use": True}
    with client.messages.stream(
        **ask(tools=[CLOCK], tool_choice=choice, max_tokens=1500)
    ) as stream:
        message = stream.get_final_message()
    (block,) = message.content
    assert isinstance(block, anthropic.types.ToolUseBlock)
    assert block.name == "clock"
    if message.stop_reason == "tool_use":  # random weights may fill a call with white space
        assert block.input in ({"zone": "utc"}, {"zone": "cet"})
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "noon"}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(**ask(messages=messages, tools=[CLOCK])).content


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="tiny", messages=HELLO).input_tokens
    usage = client.messages.create(**ask()).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_are_the_clients_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="other"):
        client.messages.create(**ask(model="other"))
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    with pytest.raises(anthropic.BadRequestError, match="images are not supported"):
        client.messages.create(**ask(messages=[{"role": "user", "content": [image]}]))
