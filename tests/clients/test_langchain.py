"""LangChain's ChatOpenAI, OpenAI and OpenAIEmbeddings."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from .conftest import Server


class Answer(BaseModel):
    """A verdict."""

    verdict: Literal["yes", "no"]


@tool
def weather(day: Literal["monday", "tuesday"]) -> str:
    """The weather of a day."""
    return f"sun on {day}"


def settings(server: Server) -> dict[str, Any]:
    return {"base_url": server.url, "api_key": "none", "model": "tiny", "max_retries": 0}


@pytest.fixture(scope="module")
def chat(server: Server) -> Any:
    return ChatOpenAI(**settings(server), temperature=0, max_tokens=1024, stream_usage=True)


def test_it_streams_what_it_answers(chat: Any) -> None:
    whole = chat.invoke("hello")
    streamed = list(chat.stream("hello"))
    assert "".join(chunk.content for chunk in streamed) == whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    assert (
        sum((c.usage_metadata or {}).get("output_tokens", 0) for c in streamed)
        == (whole.usage_metadata["output_tokens"])
    )
    assert len(chat.batch(["a", "b", "c"])) == 3


def test_logprobs_are_passed_on(chat: Any) -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke("hello")
    assert answer.response_metadata["logprobs"]["content"]


def test_tools_are_called_and_answered(chat: Any) -> None:
    bound = chat.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    question = HumanMessage("what weather?")
    asked = bound.invoke([question])
    (call,) = asked.tool_calls
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert str(result.content).startswith("sun on")
    assert chat.invoke([question, asked, result]).response_metadata["finish_reason"]
    streamed = None
    for chunk in bound.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_answers_are_structured(chat: Any, method: str) -> None:
    assert isinstance(chat.with_structured_output(Answer, method=method).invoke("?"), Answer)


def test_the_responses_api_may_carry_the_chat(server: Server) -> None:
    chat = ChatOpenAI(**settings(server), use_responses_api=True, max_tokens=1024)
    assert chat.invoke("hello").text
    bound = chat.bind_tools([weather], tool_choice="any")
    assert bound.invoke("what weather?").tool_calls


def test_completions_and_embeddings(server: Server) -> None:
    assert isinstance(OpenAI(**settings(server), max_tokens=8).invoke("hello"), str)
    embeddings = OpenAIEmbeddings(**settings(server), check_embedding_ctx_length=False)
    vectors = embeddings.embed_documents([f"text {number}" for number in range(40)])
    assert [len(vector) for vector in vectors] == [128] * 40
