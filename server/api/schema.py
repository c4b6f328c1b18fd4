"""The request bodies of completions and of adapters, and what completions share with chats.

Every optional field may be null, as in OpenAI's API. :class:`nybble.engine.SamplingParams` checks
the limits of sampling parameters; its errors name the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.engine import LIMITS, MAX_MIXED_ADAPTERS, SamplingParams
from nybble.server.adapters.names import require_name
from nybble.server.api import foreign
from nybble.server.api.body import Body, JsonObject
from nybble.server.api.format_schema import Choices, ResponseFormat, StructuredOutputs

_MAX_PROMPTS = 2048  # the limit of OpenAI's embeddings
_NAMED = 8  # of what is wrong
_MAX_ADAPTER_NAME = 256
_MAX_SALT = 1024
NO_LIMIT = -1  # no limit of tokens, in the form which llama.cpp's clients use
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default; a chat may go on to the end of the context


def limited(parameter: str) -> Any:
    """Shows the limits in the OpenAPI document, that SamplingParams will check."""
    return Field(json_schema_extra=LIMITS[parameter].schema)


Temperature = Annotated[float, limited("temperature")]
TopP = Annotated[float, limited("top_p")]
TopK = Annotated[int, limited("top_k")]
MinP = Annotated[float, limited("min_p")]
RepetitionPenalty = Annotated[float, limited("repetition_penalty")]
Seed = Annotated[int, limited("seed")]
Logprobs = Annotated[int, limited("logprobs")]
Stops = Annotated[list[str], limited("stop")]
Priority = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Salt = Annotated[str, Field(max_length=_MAX_SALT)]
Timeout = Annotated[float, Field(gt=0)]
_AdapterName = Annotated[str, Field(max_length=_MAX_ADAPTER_NAME)]  # in a request to it


def _named(name: str) -> str:
    try:
        return require_name(name)
    except ValueError as error:
        raise PydanticCustomError("invalid_value", "{text}", {"text": str(error)}) from None


_GivenName = Annotated[str, AfterValidator(_named)]  # that an administrator gives
Mixture = Annotated[
    dict[_AdapterName, Annotated[float, Field(allow_inf_nan=False)]],
    Field(min_length=1, max_length=MAX_MIXED_ADAPTERS),
]
# The name of a loaded adapter, or the weights of several that are added together.
AdapterChoice = _AdapterName | Mixture


def _stops(value: Any) -> Any:
    return ([value] if value else []) if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    """Token ids as integers: JSON's keys are strings. PHP writes an empty object as []."""
    if value == []:
        return None
    if not isinstance(value, dict):
        return value
    most = LIMITS["logit_bias"].schema["maxProperties"]
    if len(value) > most:  # before each is looked at: they may have as many errors
        raise PydanticCustomError(
            "too_many",
            "has {found} biases, expected at most {most}",
            {"found": len(value), "most": most},
        )
    wrong = [key for key in value if not (key.isascii() and key.isdigit() and len(key) < 10)]
    if wrong:
        shown = ", ".join(repr(key[:40]) for key in wrong[:_NAMED])
        verb = "is not a token id" if len(wrong) == 1 else "are not token ids"
        raise PydanticCustomError(
            "bad_key", "{keys} {verb}, as keys must be", {"keys": shown, "verb": verb}
        )
    return {int(key): bias for key, bias in value.items()}


def _no_false(value: Any) -> Any:
    """Accept false as null: logprobs is a boolean in chat completions, but a number here."""
    return None if value is False else value


def _no_empty(value: Any) -> Any:
    """Nothing as null: clients of llama.cpp write empty constraints into every request."""
    return None if value in ("", {}) else value


def _empty_if_null(value: Any) -> Any:
    return "" if value is None else value


# Empty, null or left out, it is the base model's, as with vLLM and llama.cpp.
ModelName = Annotated[str, BeforeValidator(_empty_if_null, json_schema_input_type=str | None)]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage in every event, with include_usage
    include_obfuscation: bool | None = None  # padding against traffic analysis; never added here


# OpenAI's fields for features of its own service: name → why ignoring it is safe.
OF_THE_SERVICE = {
    "user": "there is no abuse detection",
    "metadata": "nothing is stored",
    "store": "nothing is stored",
    "service_tier": "there is only one tier",
    "safety_identifier": "there is no abuse detection",
    "prompt_cache_key": "prefixes are found by their tokens",
    "prompt_cache_options": "prefixes are found by their tokens",
    "prompt_cache_retention": "prefixes are kept while there is room",
}


class OfTheService(Body):
    """Fields for features of OpenAI's own service, which are accepted and ignored."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


class Truncated(Body):
    """vLLM's fields for shortening a prompt that is too long. Special tokens around it are kept.

    truncate_prompt_tokens: how many tokens to keep; −1 for as many as leave room for the output.
    truncation_side: the side of the prompt on which tokens are removed.
    """

    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None

    def truncated(
        self, prompt: tuple[int, ...], room: int, around: tuple[int, int] = (0, 0)
    ) -> tuple[int, ...]:
        """A prompt's tokens after truncation.

        room: the most tokens which a prompt may have so that the output has room too.
        around: how many special tokens the prompt begins and ends with; they are kept.
        """
        asked = self.truncate_prompt_tokens
        if asked is None:
            return prompt
        kept = max(room, 1) if asked == -1 else asked
        if len(prompt) <= kept:
            return prompt
        first, last = around if sum(around) <= kept else (0, 0)
        inner, kept = prompt[first : len(prompt) - last], kept - first - last
        inner = inner[:kept] if self.truncation_side == "right" else inner[len(inner) - kept :]
        return prompt[:first] + inner + prompt[len(prompt) - last :]


class Sampling(OfTheService, Truncated):
    """The fields of both chat completions and completions. The last group extends OpenAI's API."""

    ignored: ClassVar[dict[str, str]] = OF_THE_SERVICE | foreign.IGNORED
    refused: ClassVar[dict[str, str]] = foreign.REFUSED
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = foreign.NEUTRAL

    model: ModelName = ""
    frequency_penalty: Annotated[float, limited("frequency_penalty")] | None = None
    logit_bias: Annotated[
        dict[int, float] | None,
        BeforeValidator(
            _biases,
            json_schema_input_type=Annotated[dict[str, float], limited("logit_bias")] | None,
        ),
    ] = None
    max_tokens: Annotated[int, limited("max_tokens")] | None = None
    n: Annotated[int, limited("n")] | None = None
    presence_penalty: Annotated[float, limited("presence_penalty")] | None = None
    seed: Seed | None = None
    stop: Annotated[
        list[str] | None, BeforeValidator(_stops, json_schema_input_type=str | Stops | None)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None

    adapter: AdapterChoice | None = None  # for clients whose model name is fixed, or mixtures
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], limited("stop_token_ids")] | None = None
    min_tokens: Annotated[int, limited("min_tokens")] | None = None
    bad_words: Annotated[list[str], limited("bad_words")] | None = None
    allowed_token_ids: Annotated[list[int], limited("allowed_token_ids")] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logprob_token_ids: Annotated[list[int], limited("logprob_token_ids")] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Priority | None = None
    cache_salt: Salt | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    # The same in the words of llama.cpp (the first and last) and of SGLang (the last three).
    grammar: Annotated[str | None, BeforeValidator(_no_empty)] = None
    ebnf: Annotated[str | None, BeforeValidator(_no_empty)] = None
    regex: Annotated[str | None, BeforeValidator(_no_empty)] = None
    json_schema: Annotated[JsonObject | None, BeforeValidator(_no_empty)] = None
    timeout: Timeout | None = None
    prompt_logprobs: Logprobs | None = None
    # Whether the text of a special token becomes that token. The default is true for completions
    # and false for the messages of a chat.
    parse_special: bool | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> Sampling:
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "prompt_logprobs is allowed only when stream is false",
                {"param": "prompt_logprobs"},
            )
        options = self.stream_options
        asked = options is not None and any(value for _, value in options)
        if asked and not self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "stream_options is allowed only when stream is true",
                {"param": "stream_options"},
            )
        return self

    @property
    def sequences(self) -> int:
        """How many continuations to generate for each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream has the number of tokens used so far."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, float]
    ) -> SamplingParams:
        """The request's parameters for the engine.

        defaults: values for the fields which the request leaves out.

        Raises ParameterError naming a parameter that is out of range.
        """
        same = LIMITS.keys() - {"max_tokens", "logprobs"}
        given = {name: getattr(self, name) for name in same if getattr(self, name) is not None}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **{**defaults, **given})


Prompt = str | list[int]


# For the OpenAPI document only: validating with this union would try every form on a long list of
# token ids.
PromptShapes = str | list[str] | list[int] | list[list[int]]


def prompts_of(value: Any) -> Any:
    """OpenAI's four forms of ``prompt`` as a list of prompts, each text or token ids."""
    if isinstance(value, str) and value:
        return [value]
    if value in ("", []):
        raise PydanticCustomError("prompt_shape", "expected at least one token, but it is empty")
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > _MAX_PROMPTS:
            raise PydanticCustomError("too_many", f"at most {_MAX_PROMPTS} are allowed")
        if (
            empty := next((index for index, item in enumerate(value) if item in ("", [])), -1)
        ) >= 0:
            raise PydanticCustomError(
                "prompt_shape", f"expected at least one token in each, but [{empty}] is empty"
            )
        if all(isinstance(item, str) for item in value):
            return value
        if all(
            isinstance(item, list) and item and all(type(token) is int for token in item)
            for item in value
        ):
            return value
    raise PydanticCustomError(
        "prompt_shape",
        "expected a string, a list of strings, a list of token ids, or a list of such lists, "
        "none of them empty",
    )


class CompletionRequest(Sampling):
    ignored: ClassVar[dict[str, str]] = OF_THE_SERVICE | foreign.IGNORED | foreign.IGNORED_REASONING
    refused: ClassVar[dict[str, str]] = (
        foreign.REFUSED
        | foreign.REFUSED_IN_COMPLETIONS
        | {"suffix": "suffix is not supported: put the text into the prompt"}
    )
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = foreign.NEUTRAL_IN_COMPLETIONS

    prompt: Annotated[Any, BeforeValidator(prompts_of, json_schema_input_type=PromptShapes)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[
        int | None,
        BeforeValidator(_no_false, json_schema_input_type=Logprobs | Literal[False] | None),
    ] = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        # Clients may send the default, 1, explicitly.
        if self.best_of not in (None, 0, 1, self.sequences):
            raise PydanticCustomError(
                "unsupported_parameter",
                "best_of other than n is not supported",
                {"param": "best_of"},
            )
        return self

    @property
    def limit(self) -> int:
        """The most tokens to generate, or NO_LIMIT."""
        return _COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[Prompt]:
        prompts: list[Prompt] = self.prompt
        return prompts

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, float]
    ) -> SamplingParams:
        params = super().sampling_params(max_tokens, logprobs, defaults)
        if self.echo and logprobs is not None:
            return replace(params, prompt_logprobs=max(logprobs, self.prompt_logprobs or 0))
        return params


class AbortRequest(Body):
    """rid: the X-Request-Id of a request, or the id of its answer."""

    rid: Annotated[str, Field(min_length=1, max_length=_MAX_SALT)]


class LoadAdapterRequest(Body):
    """The fields of vLLM's request to load an adapter.

    lora_path: a folder below an allowed root.
    mixture: instead of a path, the weights of loaded adapters.
    load_inplace: replace an adapter of the same name.
    expected_version: the version to replace; nothing is done if it is another by now.
    """

    lora_name: _GivenName
    lora_path: Annotated[str, Field(min_length=1)] | None = None
    mixture: Mixture | None = None
    load_inplace: bool | None = None
    expected_version: str | None = None
    # Ignored: vLLM's clients may send it, but the tensors show whether the adapter fits the model.
    base_model_name: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> LoadAdapterRequest:
        if (self.lora_path is None) == (self.mixture is None):
            raise PydanticCustomError(
                "invalid_value", "give either lora_path or mixture", {"param": "lora_path"}
            )
        return self


class UnloadAdapterRequest(Body):
    lora_name: _GivenName
    expected_version: str | None = None
    lora_int_id: int | None = None  # ignored: vLLM's own numbering of adapters


class ChangeAdapterRequest(Body):
    """pinned: whether the adapter stays in host memory."""

    pinned: bool
    expected_version: str | None = None


class RollBackRequest(Body):
    """version: an earlier one; the one before if it is left out."""

    version: str | None = None
    expected_version: str | None = None
