"""The request bodies of chat completions, and of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.engine.conversation import turn_of
from nybble.server.api import foreign
from nybble.server.api.body import Body
from nybble.server.api.format_schema import ResponseFormat
from nybble.server.api.schema import NO_LIMIT, OF_THE_SERVICE, Logprobs, Sampling

MAX_TOOLS = 128
MAX_MESSAGES = 1 << 14
_MAX_PARTS = 1 << 15  # of all messages together; tool calls are parts too


def _no_zero(value: Any) -> Any:
    if value == 0 or (isinstance(value, int) and value < NO_LIMIT):
        raise PydanticCustomError("too_small", f"expected 1 or more, or {NO_LIMIT} for no limit")
    return value


ChatLimit = Annotated[int, BeforeValidator(_no_zero, json_schema_input_type=int)]


def _few_parts(messages: list[BaseModel]) -> list[BaseModel]:
    fields = (value for message in messages for value in message.__dict__.values())
    parts = sum(len(value) for value in fields if isinstance(value, list))
    if parts > _MAX_PARTS:
        raise PydanticCustomError(
            "invalid_value",
            "expected at most {most} parts and calls in all, but there are {parts}",
            {"most": _MAX_PARTS, "parts": parts},
        )
    return messages


# Of a list of messages or of input items.
FEW_PARTS = AfterValidator(_few_parts)

_KINDS = {"image": "images", "audio": "audio", "video": "video", "file": "files"}


def require_text(*types: str) -> BeforeValidator:
    """Accepts these content types; the error for others says what kind of content they are."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value not in types:
            found = (what for kind, what in _KINDS.items() if kind in value)
            what = next(found, f"parts of type {value[:40]!r}")
            raise PydanticCustomError(
                "unsupported_parameter",
                "{what} are not supported: this server's models read text",
                {"what": what},
            )
        return value

    return BeforeValidator(check)


class ContentPart(Body):
    """Text, the only kind of content which the models of this server read."""

    ignored: ClassVar[dict[str, str]] = {
        "cache_control": "prefixes are kept while there is room",
        "prompt_cache_breakpoint": "prefixes are found by their tokens",
    }

    type: Annotated[Literal["text"], require_text("text")]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None  # left over from joined stream deltas


class Message(Body):
    """One turn. Unknown fields are passed on to the model's chat template as they are."""

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
    # What the assistant thought, in the words of vLLM and of DeepSeek. The template decides what of
    # it the model sees again.
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError(
                "invalid_value",
                f"a message of role {self.role} needs content",
                {"param": "content"},
            )
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FEW_PARTS]


class Function(Body):
    ignored: ClassVar[dict[str, str]] = {"cache_control": "prefixes are kept while there is room"}

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # refuse what cannot be enforced, instead of leaving it to the model


class Tool(Body):
    ignored: ClassVar[dict[str, str]] = {"cache_control": "prefixes are kept while there is room"}

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1)]


class AllowedToolChoice(Body):
    """All tools are in the prompt, and these may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TemplateOptions(Body):
    """How messages become a prompt.

    add_special_tokens: whether the tokenizer adds its special tokens (such as BOS) to what the
        template wrote.
    thinking_token_budget: how many tokens reasoning may have; −1 for any number. Some templates
        tell the model.
    chat_template: used instead of the model's own, if the server allows it.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking_token_budget: Annotated[int, Field(ge=NO_LIMIT)] | None = None

    @model_validator(mode="after")
    def _new_turn_or_old(self) -> TemplateOptions:
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "invalid_value",
                "add_generation_prompt and continue_final_message exclude each other",
                {"param": "add_generation_prompt"},
            )
        return self


class Prediction(Body):
    """Text that the answer probably has, from which drafts are made."""

    type: Literal["content"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Sampling, TemplateOptions):
    ignored: ClassVar[dict[str, str]] = {
        **OF_THE_SERVICE,
        **foreign.IGNORED,
        "stream_reasoning": "reasoning is streamed as it is generated",
    }
    refused: ClassVar[dict[str, str]] = {
        **foreign.REFUSED,
        **foreign.REFUSED_IN_CHATS,
        "functions": "functions is deprecated and not supported",
        "function_call": "function_call is deprecated and not supported",
        "audio": "audio is not supported: models here write text",
        "web_search_options": "web search is not supported",
        "verbosity": "verbosity is not supported",
        "moderation": "moderation is not supported: there is no moderation model",
    }
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = foreign.NEUTRAL_IN_CHATS

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    max_tokens: ChatLimit | None = None
    max_completion_tokens: ChatLimit | None = None
    echo: bool | None = None  # repeat the continued last message in the answer
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedToolChoice | AllowedToolChoice, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    response_format: ResponseFormat | None = None
    include_reasoning: bool | None = None  # false: reasoning is left out of the answer
    # Whether reasoning is told apart from content, in the words of SGLang and of llama.cpp.
    separate_reasoning: bool | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None

    @model_validator(mode="after")
    def _logprobs_first(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                "invalid_value",
                "top_logprobs is allowed only when logprobs is true",
                {"param": "top_logprobs"},
            )
        return self

    @property
    def splits_reasoning(self) -> bool:
        """Whether reasoning is told apart from content."""
        return self.separate_reasoning is not False and self.reasoning_format != "none"

    @property
    def echoed(self) -> str:
        """What the answer begins with: the assistant's last message if ``echo`` asks for it."""
        last = self.messages[-1]
        if not self.echo or last.role != "assistant":
            return ""
        return str(turn_of(last.model_dump())["content"])

    @property
    def limit(self) -> int | None:
        """The most tokens to generate; None or NO_LIMIT for as many as there is room for."""
        limits = (self.max_completion_tokens, self.max_tokens)
        return next((limit for limit in limits if limit is not None), None)


class TokenizeRequest(TemplateOptions):
    """Either a prompt or messages."""

    ignored: ClassVar[dict[str, str]] = {
        name: foreign.IGNORED[name] for name in ("media_io_kwargs", "mm_processor_kwargs")
    }

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    return_token_strs: bool | None = None

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
