"""Whole loops of agents: the model calls a tool, is given its result, and answers from it.

The model (``scripted_model.py``) speaks of the weather only behind a turn in which it asked for it.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypedDict

import agents
import pytest
import smolagents
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from agents.models.openai_responses import OpenAIResponsesModel
from anthropic import AsyncAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode, tools_condition
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.messages import ThinkingPart, ToolCallPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.models.openai import OpenAIResponsesModel as ResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from ..conftest import Server

QUESTION = "How is the weather?"
FORECAST = "It is sunny in Rome."


def forecast(city: str) -> str:
    """The weather of a city.

    Args:
        city: Its name.
    """
    return f"sunny in {city}"


class Report(BaseModel):
    city: str
    sky: str


# LangGraph


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langgraph(server: Server, responses: bool) -> None:
    class State(TypedDict):
        messages: Annotated[list[Any], add_messages]

    tools = [tool("weather")(forecast)]
    chat = ChatOpenAI(
        model="tiny", base_url=server.url, api_key="none", use_responses_api=responses
    ).bind_tools(tools)
    graph = StateGraph(State)
    graph.add_node("model", lambda state: {"messages": [chat.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    loop = graph.compile()
    asked: Any = {"messages": [("user", QUESTION)]}

    messages = loop.invoke(asked)["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[1].tool_calls[0]["args"] == {"city": "Rome"}
    assert messages[-1].text == FORECAST
    # Streamed, each message in pieces that add up.
    pieces = [piece for piece, _ in loop.stream(asked, stream_mode="messages")]
    last = [piece for piece in pieces if piece.id == pieces[-1].id]
    assert len(last) > 3
    assert "".join(piece.text for piece in last) == FORECAST


# OpenAI's Agents SDK


def openai_model(server: Server, kind: type[Any]) -> Any:
    client = AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0)
    return kind(model="tiny", openai_client=client)


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
@pytest.mark.parametrize("streamed", [False, True])
def test_openai_agents_hand_over_and_call_a_tool(
    server: Server, kind: type[Any], streamed: bool
) -> None:
    agents.set_tracing_disabled(True)
    weather = agents.function_tool(forecast, name_override="weather")
    forecaster = agents.Agent(name="forecaster", model=openai_model(server, kind), tools=[weather])
    host = agents.Agent(name="host", model=openai_model(server, kind), handoffs=[forecaster])

    async def loop() -> Any:
        if not streamed:
            return await agents.Runner.run(host, QUESTION)
        result = agents.Runner.run_streamed(host, QUESTION)
        deltas = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event"
            and event.data.type == "response.output_text.delta"
        ]
        assert "".join(deltas) == FORECAST
        return result

    result = asyncio.run(loop())
    assert result.final_output == FORECAST
    assert result.last_agent.name == "forecaster"
    kinds = [item.type for item in result.new_items if item.type != "reasoning_item"]
    assert kinds == [
        *("handoff_call_item", "handoff_output_item"),
        *("tool_call_item", "tool_call_output_item"),
        "message_output_item",
    ]


def test_openai_agents_go_on_from_a_stored_response(server: Server) -> None:
    """Only what is new is sent: the server has the rest."""
    agents.set_tracing_disabled(True)
    weather = agents.function_tool(forecast, name_override="weather")
    agent = agents.Agent(
        name="forecaster", model=openai_model(server, OpenAIResponsesModel), tools=[weather]
    )
    run = agents.Runner.run(agent, QUESTION, auto_previous_response_id=True)
    assert asyncio.run(run).final_output == FORECAST


# pydantic-ai


def pydantic_model(server: Server, kind: str) -> Any:
    if kind == "messages":
        client = AsyncAnthropic(base_url=server.url.removesuffix("/v1"), api_key="none")
        return AnthropicModel("tiny", provider=AnthropicProvider(anthropic_client=client))
    provider = OpenAIProvider(base_url=server.url, api_key="none")
    made = {"chat": OpenAIChatModel, "responses": ResponsesModel}[kind]
    return made("tiny", provider=provider)


KINDS = pytest.mark.parametrize("kind", ["chat", "responses", "messages"])


@KINDS
def test_pydantic_ai(server: Server, kind: str) -> None:
    agent = Agent(pydantic_model(server, kind))
    agent.tool_plain(name="weather")(forecast)
    result = agent.run_sync(QUESTION)
    assert result.output == FORECAST
    parts = [part for message in result.all_messages() for part in message.parts]
    (thought,) = [part for part in parts if isinstance(part, ThinkingPart)]
    raw = (thought.provider_details or {}).get("raw_content")  # where it is no summary
    assert (raw or [thought.content]) == ["I must look it up."]
    (call,) = [part for part in parts if isinstance(part, ToolCallPart)]
    assert call.args_as_dict() == {"city": "Rome"}
    assert result.usage.output_tokens > 0
    # The conversation goes on, with all that was said before.
    again = agent.run_sync("Sure?", message_history=result.all_messages())
    assert again.output == FORECAST


@KINDS
def test_pydantic_ai_streams(server: Server, kind: str) -> None:
    async def loop() -> list[str]:
        agent = Agent(pydantic_model(server, kind))
        agent.tool_plain(name="weather")(forecast)
        async with agent.run_stream(QUESTION) as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    assert "".join(asyncio.run(loop())) == FORECAST


@KINDS
def test_pydantic_ai_has_its_report(server: Server, kind: str) -> None:
    """What the agent returns is a call of a tool too, and every answer has to be a call."""
    agent = Agent(pydantic_model(server, kind), output_type=ToolOutput(Report))
    agent.tool_plain(name="weather")(forecast)
    assert agent.run_sync(QUESTION).output == Report(city="Rome", sky="sunny")


# smolagents


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", [smolagents.ToolCallingAgent, smolagents.CodeAgent])
def test_smolagents(server: Server, kind: type[Any], streamed: bool) -> None:
    model = smolagents.OpenAIModel("tiny", api_base=server.url, api_key="none")
    weather = smolagents.tool(forecast)
    weather.name = "weather"
    agent = kind(tools=[weather], model=model, max_steps=4, stream_outputs=streamed)
    assert agent.run(QUESTION) == FORECAST
    steps = [step for step in agent.memory.steps if isinstance(step, smolagents.ActionStep)]
    assert len(steps) == 2
    assert [step.error for step in steps] == [None, None]
