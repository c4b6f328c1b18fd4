"""What the bodies of requests have in common, and the bodies of completions.

A field that would change the meaning and is not supported is refused.

Every optional field may be null, as OpenAI's may. Ranges of sampling parameters are checked by
:class:`nybble.engine.SamplingParams`, which names the parameter itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.engine import SamplingParams

_MAX_PROMPTS = 2048  # the limit of OpenAI's embeddings
_MAX_N = 128
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 256
_MAX_BIASES = 1024
_MAX_ADAPTER_NAME = 256
_MAX_CHOICES = 1024


class Body(BaseModel):
    """Strict: no coercion, no unknown fields, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    # Fields known from OpenAI's API that this server refuses: name → why.
    refused: ClassVar[dict[str, str]] = {}
    # Fields it takes and makes nothing of: name → why that changes nothing that is generated.
    ignored: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        """Fields that ask for what the server cannot do; null, false and [] ask for nothing."""
        if not isinstance(data, dict):
            return data
        for name, why in cls.refused.items():
            if data.get(name):
                raise PydanticCustomError(
                    "unsupported_parameter", "{why}", {"why": why, "param": name}
                )
        return {name: value for name, value in data.items() if name not in cls.refused}


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list):
        if len(stops) > _MAX_STOPS:
            raise PydanticCustomError("too_many", f"at most {_MAX_STOPS} stop strings are allowed")
        for stop in stops:
            if isinstance(stop, str) and len(stop) > _MAX_STOP_LENGTH:
                raise PydanticCustomError(
                    "too_long", f"a stop string may have at most {_MAX_STOP_LENGTH} characters"
                )
    return stops


def _biases(value: Any) -> Any:
    """JSON has token ids as strings."""
    if not isinstance(value, dict):
        return value
    if len(value) > _MAX_BIASES:
        raise PydanticCustomError("too_many", f"at most {_MAX_BIASES} biases are allowed")
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
        raise PydanticCustomError("bad_key", "the keys of logit_bias are token ids")
    return {int(key): bias for key, bias in value.items()}


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; never added here


# OpenAI's fields that are about its own service.
OF_THE_SERVICE = {
    "user": "there is no abuse detection",
    "metadata": "nothing is stored",
    "store": "nothing is stored",
    "service_tier": "there is one",
    "safety_identifier": "there is no abuse detection",
    "prompt_cache_key": "prefixes are found by their tokens",
    "prompt_cache_options": "prefixes are found by their tokens",
    "prompt_cache_retention": "prefixes are kept while there is room",
}


class OfTheService(Body):
    """The fields that are ignored because they are about OpenAI's service."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


class Sampling(OfTheService):
    """What chat completions and completions share. The last group extends OpenAI's API."""

    ignored: ClassVar[dict[str, str]] = OF_THE_SERVICE

    model: str
    frequency_penalty: float | None = None
    logit_bias: Annotated[
        dict[int, float] | None,
        BeforeValidator(_biases, json_schema_input_type=dict[str, float] | None),
    ] = None
    max_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_N)] | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[
        list[str] | None, BeforeValidator(_stops, json_schema_input_type=str | list[str] | None)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None

    adapter: str | None = None  # a loaded LoRA adapter, for clients whose model name is fixed
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=_MAX_STOPS)] | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=_MAX_CHOICES)] | None = None
    guided_grammar: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    prompt_logprobs: int | None = None
    # Whether the text of a special token is that token: in completions by default, in the messages
    # of a chat not.
    parse_special: bool | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> Sampling:
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "prompt_logprobs is allowed only when stream is false",
                {"param": "prompt_logprobs"},
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "stream_options is allowed only when stream is true",
                {"param": "stream_options"},
            )
        return self

    @property
    def sequences(self) -> int:
        """How many continuations of each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, float]
    ) -> SamplingParams:
        """``defaults`` are for what the request leaves out. Raises ParameterError."""
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "frequency_penalty",
                "logit_bias",
                "presence_penalty",
                "seed",
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "ignore_eos",
            )
            if getattr(self, name) is not None
        }
        if self.top_k is not None:
            # −1 is how other servers spell "off".
            given["top_k"] = 0 if self.top_k == -1 else self.top_k
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            **{**defaults, **given},
        )


Prompt = str | list[int]


# For documents; to validate by it would try each shape on a long list of token ids.
PromptShapes = str | list[str] | list[int] | list[list[int]]


def prompts_of(value: Any) -> Any:
    """OpenAI's four shapes as a list of prompts, each text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > _MAX_PROMPTS:
            raise PydanticCustomError("too_many", f"at most {_MAX_PROMPTS} are allowed")
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
    refused = {"suffix": "suffix is not supported: put the text into the prompt"}

    prompt: Annotated[Any, BeforeValidator(prompts_of, json_schema_input_type=PromptShapes)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.sequences:
            raise PydanticCustomError(
                "unsupported_parameter",
                "best_of other than n is not supported",
                {"param": "best_of"},
            )
        return self

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


class LoadAdapterRequest(Body):
    """lora_path: a folder below an allowed root. load_inplace: replace an adapter of that name."""

    lora_name: Annotated[str, Field(min_length=1, max_length=_MAX_ADAPTER_NAME)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool | None = None
    base_model_name: str | None = None  # vLLM's clients may send it; tensors decide what fits


class UnloadAdapterRequest(Body):
    lora_name: str
    lora_int_id: int | None = None  # vLLM's own numbering
