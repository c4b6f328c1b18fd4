"""The request bodies of /v1/messages, Anthropic's API, and their conversion to a chat."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.api.body import Body
from nybble.server.api.chat_schema import (
    FEW_PARTS,
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRequest,
    Function,
    ReasoningEffort,
    Tool,
    require_text,
)
from nybble.server.api.parse import converted
from nybble.server.api.schema import (
    AdapterChoice,
    MinP,
    Priority,
    RepetitionPenalty,
    Salt,
    Seed,
    Stops,
    Temperature,
    Timeout,
    TopK,
    TopP,
)

_PREFIXES_KEPT = "prefixes are kept while there is room"
_CACHED = {"cache_control": _PREFIXES_KEPT}
_MEDIA = ("image", "document", "search_result")


class _Block(Body):
    # Clients send blocks of earlier answers back, with whatever those had.
    model_config = ConfigDict(extra="ignore")


class TextBlock(_Block):
    type: Annotated[Literal["text"], require_text("text")]
    text: str


class ThinkingBlock(_Block):
    """Reasoning of an earlier answer. The chat template decides what the model sees of it."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(_Block):
    """Reasoning that only Anthropic can read. It is left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    def call(self) -> dict[str, Any]:
        arguments = json.dumps(self.input, ensure_ascii=False)
        function = {"name": self.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")


def _kind(block: Any) -> str | None:
    """The tag of a block. It is no field's name, which the path of an error would have twice."""
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    if isinstance(kind, str) and kind in _MEDIA:
        return "text block"  # whose error says that this server's models read nothing else
    return f"{kind} block" if isinstance(kind, str) and kind in _BLOCKS else None


_KNOWN = Discriminator(
    _kind,
    custom_error_type="invalid_value",
    custom_error_message=f"expected a block whose type is one of {', '.join(_BLOCKS)}",
)


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None

    def turn(self) -> dict[str, Any]:
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        if self.is_error and not content:
            content = "error"
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": content}


Block = Annotated[
    Annotated[TextBlock, Tag("text block")]
    | Annotated[ThinkingBlock, Tag("thinking block")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking block")]
    | Annotated[ToolUseBlock, Tag("tool_use block")]
    | Annotated[ToolResultBlock, Tag("tool_result block")],
    _KNOWN,
]


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    def turns(self) -> list[dict[str, Any]]:
        """The same as turns of a chat: results of tools have turns of their own there."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results = [block.turn() for block in self.content if isinstance(block, ToolResultBlock)]
        texts = [block.text for block in self.content if isinstance(block, TextBlock)]
        calls = [block.call() for block in self.content if isinstance(block, ToolUseBlock)]
        thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
        turn: dict[str, Any] = {"role": self.role, "content": "\n".join(texts)}
        if self.role != "assistant":
            return [*results, turn] if texts or not results else results
        if calls:
            turn["tool_calls"] = calls
        if thoughts:
            turn["reasoning_content"] = "\n".join(thoughts)
        return [*results, turn]


_ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class _NamedFunction(Function):
    """Anthropic's names may be longer than OpenAI's."""

    name: _ToolName


class AnthropicTool(Body):
    ignored: ClassVar[dict[str, str]] = {
        **_CACHED,
        "eager_input_streaming": "arguments are streamed as they are generated",
        "input_examples": "chat templates do not show examples",
        "defer_loading": "all tools are shown to the model",
        "allowed_callers": "the client calls tools",
    }

    type: Literal["custom"] | None = None
    name: _ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_the_client(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind not in (None, "custom"):
            raise PydanticCustomError(
                "unsupported_parameter",
                "tools of type {kind} are not supported: there are no built-in tools",
                {"kind": repr(kind)[:60], "param": "type"},
            )
        return data

    def tool(self) -> Tool:
        function = _NamedFunction(
            name=self.name,
            description=self.description,
            parameters=self.input_schema,
            strict=self.strict,
        )
        return Tool(type="function", function=function)


class AnthropicToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> AnthropicToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError(
                "invalid_value", "name goes with type tool, and only with it", {"param": "name"}
            )
        return self

    def choice(self) -> Any:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"auto": "auto", "any": "required", "none": "none"}[self.type]


class Thinking(Body):
    """``adaptive`` leaves it to the model's chat template, as leaving ``thinking`` out does.

    budget_tokens: how many tokens the model may think, with ``enabled``.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    definition: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: ReasoningEffort | None = None
    format: OutputFormat | None = None


class Prompted(Body):
    """What a prompt is made of."""

    ignored: ClassVar[dict[str, str]] = _CACHED
    refused: ClassVar[dict[str, str]] = {
        "mcp_servers": "MCP servers are not called from here: offer their tools",
        "container": "there are no containers",
        "context_management": "context_management is not supported: send what is to be read",
    }
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "context_management": (
            {"edits": []},
            {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        )
    }

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES), FEW_PARTS]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    # As in chat completions.
    adapter: AdapterChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat(self) -> ChatRequest:
        """The same request as a chat completion. Raises ApiError 400."""
        return converted(ChatRequest, self._chat())

    def _chat(self) -> dict[str, Any]:
        turns = [turn for message in self.messages for turn in message.turns()]
        if self.system:
            text = self.system
            if not isinstance(text, str):
                text = "\n".join(block.text for block in text)
            turns.insert(0, {"role": "system", "content": text})
        given: dict[str, Any] = {"model": self.model, "messages": turns}
        if turns[-1]["role"] == "assistant" and not turns[-1].get("tool_calls"):
            given["continue_final_message"] = True
        if self.tools:
            given["tools"] = [tool.tool() for tool in self.tools]
        if self.tool_choice is not None:
            given["tool_choice"] = self.tool_choice.choice()
            if self.tool_choice.disable_parallel_tool_use:
                given["parallel_tool_calls"] = False
        config = self.output_config
        if config is not None:
            given["reasoning_effort"] = config.effort
            if config.format is not None:
                schema = {"name": "answer", "schema": config.format.definition}
                given["response_format"] = {"type": "json_schema", "json_schema": schema}
        return given | self._thinks()

    def _thinks(self) -> dict[str, Any]:
        given = {"chat_template_kwargs": self.chat_template_kwargs}
        if self.thinking is None:
            return given
        found: dict[str, Any] = {"include_reasoning": self.thinking.display != "omitted"}
        if self.thinking.type == "disabled":
            found["reasoning_effort"] = "none"
        elif self.thinking.type == "enabled":
            # The switches of the families; a template reads its own.
            switches = {"enable_thinking": True, "thinking": True}
            given["chat_template_kwargs"] = switches | (self.chat_template_kwargs or {})
            found["thinking_token_budget"] = self.thinking.budget_tokens
        return given | found


class CountTokensRequest(Prompted):
    """A prompt whose tokens are to be counted."""


class MessagesRequest(Prompted):
    ignored: ClassVar[dict[str, str]] = {
        **_CACHED,
        "metadata": "there is no abuse detection",
        "service_tier": "there is only one tier",
        "inference_geo": "there is only one place",
    }

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Stops | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None

    # As in chat completions.
    cache_salt: Salt | None = None
    min_p: MinP | None = None
    priority: Priority | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    timeout: Timeout | None = None

    def _chat(self) -> dict[str, Any]:
        names = (
            *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
            *("max_tokens", "cache_salt", "priority", "timeout"),
        )
        same = {name: getattr(self, name) for name in names}
        return super()._chat() | same | {"stop": self.stop_sequences}
