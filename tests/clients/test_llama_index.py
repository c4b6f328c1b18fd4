"""LlamaIndex's OpenAILike. Annotations are not postponed: it reads those of tools."""

from typing import Any, Literal

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

from .conftest import Server


class Answer(BaseModel):
    """A verdict."""

    verdict: Literal["yes", "no"]


def weather(day: Literal["monday", "tuesday"]) -> str:
    """The weather of a day."""
    return f"sun on {day}"


def llm(server: Server, **options: Any) -> Any:
    return OpenAILike(
        **{
            "model": "tiny",
            "api_base": server.url,
            "api_key": "none",
            "is_chat_model": True,
            "is_function_calling_model": True,
            "max_tokens": 1024,
            "max_retries": 0,
            "temperature": 0,
            **options,
        }
    )


@pytest.mark.parametrize("chat", [True, False])
def test_it_completes_and_streams(server: Server, chat: bool) -> None:
    model = llm(server, is_chat_model=chat)
    whole = model.complete("hello", max_tokens=16).text
    assert "".join(part.delta for part in model.stream_complete("hello", max_tokens=16)) == whole
    answer = model.chat([ChatMessage(role="user", content="hello")])
    assert isinstance(answer.message.content, str)


def test_tools_are_called(server: Server) -> None:
    tool = FunctionTool.from_defaults(weather)
    model = llm(server)
    answer = model.chat_with_tools([tool], user_msg="what weather?", tool_required=True)
    calls = model.get_tool_calls_from_response(answer)
    assert calls[0].tool_name == "weather"
    assert calls[0].tool_kwargs["day"] in ("monday", "tuesday")
    streamed = model.stream_chat_with_tools([tool], user_msg="weather?", tool_required=True)
    *_, last = streamed
    assert model.get_tool_calls_from_response(last)[0].tool_name == "weather"


def test_answers_are_structured(server: Server) -> None:
    for options in ({}, {"should_use_structured_outputs": True}):
        model = llm(server, **options)
        found = model.structured_predict(Answer, PromptTemplate("is it {what}?"), what="so")
        assert isinstance(found, Answer)
