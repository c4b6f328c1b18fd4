"""The body of /v1/responses, and the chat it comes to."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from nybble.server.api.chat_schema import MAX_MESSAGES, MAX_TOOLS, ChatRequest, Function
from nybble.server.api.schema import OF_THE_SERVICE, Body, OfTheService


class _Item(Body):
    # Output items of earlier responses come back as input with their ids and states.
    model_config = ConfigDict(extra="ignore")


class InputText(_Item):
    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(_Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]

    def turn(self) -> dict[str, Any]:
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        parts = [{"type": "text", "text": part.text} for part in self.content]
        return {"role": self.role, "content": parts}


class InputCall(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def call(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class InputCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str

    def turn(self) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    definition: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(Body):
    refused: ClassVar[dict[str, str]] = {"verbosity": "verbosity is not supported"}

    format: TextFormat | None = None


class FunctionTool(Function):
    type: Literal["function"]


class NamedFunction(Body):
    type: Literal["function"]
    name: str


class ResponsesRequest(OfTheService):
    ignored: ClassVar[dict[str, str]] = OF_THE_SERVICE | {
        "metadata": "nothing is stored; it comes back with the response",
        "stream_options": "events carry no padding",
    }
    refused: ClassVar[dict[str, str]] = {
        "previous_response_id": "responses are not stored: send the conversation as input",
        "conversation": "conversations are not stored: send the conversation as input",
        "prompt": "prompt templates are not stored",
        "background": "background responses are not supported",
        "reasoning": "reasoning is not supported",
        "max_tool_calls": "max_tool_calls is not supported: there are no built-in tools",
        "include": "include is not supported",
        "moderation": "moderation is not supported: there is no moderation model",
        "context_management": "context_management is not supported: send what is to be read",
        "top_logprobs": "logprobs are not supported here: use /v1/chat/completions",
    }

    model: str
    input: (
        str
        | Annotated[
            list[InputMessage | InputCall | InputCallOutput],
            Field(min_length=1, max_length=MAX_MESSAGES),
        ]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    temperature: float | None = None
    text: TextOptions | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    top_p: float | None = None
    truncation: Literal["disabled"] | None = None

    stream_options: dict[str, Any] | None = None  # ignored

    def chat(self) -> ChatRequest:
        """The same request as a chat completion."""
        given: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_output_tokens,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._response_format(),
        }
        if self.tools:
            given["tools"] = [
                {
                    "type": "function",
                    "function": tool.model_dump(exclude={"type"}, exclude_none=True),
                }
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, NamedFunction):
            given["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        else:
            given["tool_choice"] = self.tool_choice
        return ChatRequest.model_validate(given)

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            if not isinstance(item, InputCall):
                messages.append(item.turn())
                continue
            # Calls belong to the assistant's turn before them; between items there is none.
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            messages[-1].setdefault("tool_calls", []).append(item.call())
        return messages

    def _response_format(self) -> dict[str, Any] | None:
        wanted = None if self.text is None else self.text.format
        if wanted is None:
            return None
        if wanted.type != "json_schema":
            return {"type": wanted.type}
        schema = {
            "name": wanted.name or "response",
            "schema": wanted.definition,
            "strict": wanted.strict,
        }
        return {"type": "json_schema", "json_schema": schema}
