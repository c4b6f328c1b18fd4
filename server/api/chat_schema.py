"""The bodies of chat completions, and of requests about tokens."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.api.schema import OF_THE_SERVICE, Body, Sampling

MAX_TOOLS = 128
MAX_MESSAGES = 1 << 14


class ContentPart(Body):
    """Text, the only kind of content a language model here reads."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None  # clients that join streamed deltas leave it in


class Message(Body):
    """One turn. Fields unknown here are handed to the model's chat template as they are."""

    model_config = ConfigDict(extra="allow")

    refused: ClassVar[dict[str, str]] = {
        "audio": "audio is not supported: models here read and write text",
        "function_call": "function_call is deprecated and not supported: use tool_calls",
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError(
                "invalid_value",
                f"a message of role {self.role} needs content",
                {"param": "content"},
            )
        return self


class JsonSchema(Body):
    name: str
    description: str | None = None
    # The name is OpenAI's, and `schema` is taken by pydantic.
    strict: bool | None = None  # refuse what cannot be enforced, instead of leaving it to the model
    definition: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "invalid_value",
                "json_schema is required with type json_schema, and only with it",
                {"param": "json_schema"},
            )
        return self


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # refuse what cannot be enforced, instead of leaving it to the model


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Sampling):
    ignored: ClassVar[dict[str, str]] = OF_THE_SERVICE | {"prediction": "a hint for speed"}
    refused: ClassVar[dict[str, str]] = {
        "functions": "functions is deprecated and not supported",
        "function_call": "function_call is deprecated and not supported",
        "audio": "audio is not supported: models here write text",
        "web_search_options": "web search is not supported",
        "reasoning_effort": "reasoning_effort is not supported",
        "verbosity": "verbosity is not supported",
        "moderation": "moderation is not supported: there is no moderation model",
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _logprobs_first(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "invalid_value",
                "top_logprobs is allowed only when logprobs is true",
                {"param": "top_logprobs"},
            )
        return self


class TokenizeRequest(Body):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError(
                "invalid_value", "give either prompt or messages", {"param": "prompt"}
            )
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]
