"""LiteLLM with the server as an OpenAI-compatible provider."""

from __future__ import annotations

import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

from .conftest import Server

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"day": {"type": "string", "enum": ["monday", "tuesday"]}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}


class Answer(BaseModel):
    verdict: Literal["yes", "no"]


@pytest.fixture(params=["openai/tiny", "hosted_vllm/tiny"])
def options(request: pytest.FixtureRequest, server: Server) -> dict[str, Any]:
    return {"model": request.param, "api_base": server.url, "api_key": "none", "num_retries": 0}


def test_a_chat_streams_what_it_answers(options: dict[str, Any]) -> None:
    options |= {"messages": HELLO, "temperature": 0, "max_tokens": 16}
    whole: Any = litellm.completion(**options)
    chunks: Any = litellm.completion(**options, stream=True, stream_options={"include_usage": True})
    parts = list(chunks)
    text = "".join(c.choices[0].delta.content or "" for c in parts if c.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0


def test_tools_are_called(options: dict[str, Any]) -> None:
    # A seed, since for vLLM LiteLLM takes additionalProperties out, and without it a model with
    # random weights may write keys until its context is full.
    answer: Any = litellm.completion(
        **options, messages=HELLO, tools=[WEATHER], tool_choice="required", seed=1
    )
    call = answer.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["day"] in ("monday", "tuesday")


def test_answers_are_structured(options: dict[str, Any]) -> None:
    answer: Any = litellm.completion(**options, messages=HELLO, response_format=Answer)
    assert Answer.model_validate_json(answer.choices[0].message.content)


def test_embeddings(options: dict[str, Any]) -> None:
    answer: Any = litellm.embedding(**options, input=["a", "b"])
    assert [len(item["embedding"]) for item in answer.data] == [128, 128]


def test_completions_and_responses(server: Server) -> None:
    options: dict[str, Any] = {"api_base": server.url, "api_key": "none"}
    text: Any = litellm.text_completion(
        model="text-completion-openai/tiny", prompt="hello", max_tokens=4, **options
    )
    assert isinstance(text.choices[0].text, str)
    answer: Any = litellm.responses(
        model="openai/tiny", input="hello", max_output_tokens=16, **options
    )
    assert answer.output[0].type == "message"


def test_errors_are_of_its_own_kinds(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**options, messages=HELLO, temperature=1000)
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        litellm.completion(**options | {"model": "openai/other"}, messages=HELLO)
