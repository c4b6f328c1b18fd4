"""The request body of /v1/responses, and its conversion to a chat completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter
from pydantic_core import PydanticCustomError

from nybble.server.api import foreign
from nybble.server.api.body import Body
from nybble.server.api.chat_schema import (
    FEW_PARTS,
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRequest,
    Function,
    ReasoningEffort,
    require_text,
)
from nybble.server.api.parse import converted
from nybble.server.api.schema import (
    OF_THE_SERVICE,
    AdapterChoice,
    Logprobs,
    MinP,
    ModelName,
    OfTheService,
    Priority,
    RepetitionPenalty,
    Salt,
    Seed,
    Temperature,
    Timeout,
    TopK,
    TopP,
)


class _Item(Body):
    # Clients send output items of earlier responses back as input, with ids and statuses.
    model_config = ConfigDict(extra="ignore")


class InputText(_Item):
    type: Annotated[
        Literal["input_text", "output_text", "text"],
        require_text("input_text", "output_text", "text"),
    ]
    text: str


def _parts(content: str | list[InputText]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} for part in content]


class InputMessage(_Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]

    def turn(self) -> dict[str, Any]:
        return {"role": self.role, "content": _parts(self.content)}


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
    output: str | list[InputText]

    def turn(self) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": self.call_id, "content": _parts(self.output)}


class ReasoningText(_Item):
    type: Literal["reasoning_text", "text"]
    text: str


class InputReasoning(_Item):
    """Reasoning of an earlier response. The chat template decides what the model sees of it."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _kind(item: Any) -> str | None:
    """An item's type. If it is left out, the item is a message."""
    if not isinstance(item, dict):
        return getattr(item, "type", None) or "message"
    kind = item.get("type") or "message"
    return kind if kind in _ITEMS else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="invalid_value",
        custom_error_message=f"expected an item whose type is one of {', '.join(_ITEMS)}: nothing "
        "is stored, and there are no built-in tools",
    ),
]

_ITEM_LIST: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])

_LOGPROBS = "message.output_text.logprobs"
# The others are extra content for items of built-in tools, reasoning and images; there are no such
# items here.
_INCLUDED = (
    _LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
)


def _included(value: str) -> str:
    if value not in _INCLUDED:
        raise PydanticCustomError(
            "invalid_value", "expected one of {names}", {"names": ", ".join(_INCLUDED)}
        )
    return value


class Reasoning(Body):
    """How much a model reasons: see the chat's reasoning_effort."""

    ignored: ClassVar[dict[str, str]] = {
        "summary": "reasoning is returned in full",
        "generate_summary": "reasoning is returned in full",
    }

    effort: ReasoningEffort | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    definition: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(Body):
    refused: ClassVar[dict[str, str]] = {"verbosity": "verbosity is not supported"}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class FunctionTool(Function):
    type: Literal["function"]


class NamedFunction(Body):
    type: Literal["function"]
    name: str


class AllowedFunctions(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1)]


def _chats_choice(choice: str | NamedFunction | AllowedFunctions | None) -> Any:
    """A tool_choice as chat completions have it."""
    if isinstance(choice, NamedFunction):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedFunctions):
        tools = [_chats_choice(tool) for tool in choice.tools]
        return {"type": choice.type, choice.type: {"mode": choice.mode, "tools": tools}}
    return choice


_OF_CHATS = (
    *("cache_salt", "chat_template_kwargs", "min_p", "priority", "repetition_penalty", "seed"),
    *("timeout", "top_k"),
)


class ResponsesRequest(OfTheService):
    ignored: ClassVar[dict[str, str]] = {
        **{name: why for name, why in OF_THE_SERVICE.items() if name != "store"},
        **foreign.IGNORED,
        **foreign.IGNORED_REASONING,
        "metadata": "it comes back with the response",
        "stream_options": "events carry no padding",
    }
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = foreign.NEUTRAL
    refused: ClassVar[dict[str, str]] = {
        **foreign.REFUSED,
        **dict.fromkeys(
            ("ebnf", "grammar", "json_schema", "regex"), "use text.format, or /v1/chat/completions"
        ),
        "conversation": "conversations are not stored: send the conversation as input",
        "prompt": "prompt templates are not stored",
        "max_tool_calls": "max_tool_calls is not supported: there are no built-in tools",
        "moderation": "moderation is not supported: there is no moderation model",
        "context_management": "context_management is not supported: send only what is to be read",
    }

    model: ModelName = ""
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES), FEW_PARTS]
    background: bool | None = None
    previous_response_id: str | None = None
    include: list[Annotated[str, AfterValidator(_included)]] | None = None
    reasoning: Reasoning | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    text: TextOptions | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")]
        | None
    ) = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    top_logprobs: Logprobs | None = None
    top_p: TopP | None = None
    truncation: Literal["disabled"] | None = None

    stream_options: dict[str, Any] | None = None  # ignored

    # As in chat completions.
    adapter: AdapterChoice | None = None
    cache_salt: Salt | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    min_p: MinP | None = None
    priority: Priority | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    timeout: Timeout | None = None
    top_k: TopK | None = None

    @property
    def logprobs(self) -> bool:
        """Whether to report log probabilities: ``include`` or ``top_logprobs`` asks for them."""
        return _LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def items(self) -> list[dict[str, Any]]:
        """The input as items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return [item.model_dump(exclude_none=True) for item in self.input]

    def chat(self, history: Sequence[dict[str, Any]] = ()) -> ChatRequest:
        """The same request as a chat completion. history: items that come before its input."""
        given: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(_ITEM_LIST.validate_python(list(history))),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._response_format(),
            **{name: getattr(self, name) for name in _OF_CHATS},
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
        }
        if self.tools:
            given["tools"] = [
                {
                    "type": "function",
                    "function": tool.model_dump(exclude={"type"}, exclude_none=True),
                }
                for tool in self.tools
            ]
        given["tool_choice"] = _chats_choice(self.tool_choice)
        return converted(ChatRequest, given)

    def _messages(self, history: list[InputItem]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        given = self.input
        if isinstance(given, str):
            given = [InputMessage(role="user", content=given)]
        thought = ""  # what goes with the assistant's next turn
        for item in [*history, *given]:
            if isinstance(item, InputReasoning):
                thought = item.text
                continue
            if isinstance(item, InputCall):
                # A call belongs to the assistant's turn before it. Add an empty turn if there is
                # none.
                if thought or not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                messages[-1].setdefault("tool_calls", []).append(item.call())
            else:
                messages.append(item.turn())
            if thought and messages[-1]["role"] == "assistant":
                messages[-1]["reasoning_content"] = thought
            thought = ""
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
