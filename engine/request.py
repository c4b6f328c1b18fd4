"""What a caller asks of the engine and what it gets back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nybble.engine.limits import LIMITS, OutsideLimitError
from nybble.engine.named_arguments import named_arguments
from nybble.engine.tokens import Tokens

Embedding = NDArray[np.float32]
# What is made of a prompt's final hidden states: an embedding of the last one or of their mean, or
# the scores that a classifier's head gives the last one.
Pooling = Literal["last", "mean", "score"]

FinishReason = Literal["stop", "length"]

MAX_MIXED_ADAPTERS = 8
MAX_MIXTURE_WEIGHT = 1000.0


class ParameterError(ValueError):
    """A request the engine cannot honour; ``parameter`` names the offending field."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class UnknownAdapterError(ParameterError):
    """The request's adapter is not loaded, or no longer."""


class ContextLengthError(ParameterError):
    """The prompt and the requested output together exceed the context length."""


class EngineOverloadedError(RuntimeError):
    """The waiting queue is full; try again in a few seconds."""


def require_known_tokens(parameter: str, tokens: Iterable[int], vocab: int) -> None:
    """Raises :class:`ParameterError` for a token id that is not below ``vocab``."""
    for token in tokens:
        if not 0 <= token < vocab:
            raise ParameterError(
                parameter, f"token id {token} is outside the vocabulary of {vocab}"
            )


class AdapterUnavailableError(RuntimeError):
    """The request's adapter was loaded but can no longer be read; the message says why."""


class AdapterReplacedError(RuntimeError):
    """The request was read with tokens that its adapter no longer has; read again, it is served."""


class EngineStoppedError(RuntimeError):
    """The engine is not running: it is shutting down, or has failed and takes no requests."""


class EngineFailedError(EngineStoppedError):
    """The engine failed while it had the request; the message names the cause."""


class OutOfMemoryError(RuntimeError):
    """There was no memory left to compute the request; the engine goes on with others."""


# What other libraries call a parameter, or have instead.
_ELSEWHERE = {
    "beam_width": "there is no beam search",
    "best_of": "use n, and choose among the results",
    "detokenize": "text is always made: see Completion.token_ids for the tokens",
    "do_sample": "temperature=0 does not sample",
    "early_stopping": "there is no beam search",
    "eos_token_id": "use stop_token_ids",
    "guided_decoding": "only the server constrains the form of an answer",
    "length_penalty": "there is no beam search",
    "logits_processors": "custom samplers are not supported",
    "max_completion_tokens": "use max_tokens",
    "max_length": "use max_tokens, which does not count the prompt",
    "max_new_tokens": "use max_tokens",
    "min_new_tokens": "use min_tokens",
    "num_beams": "there is no beam search",
    "num_return_sequences": "use n",
    "repeat_penalty": "use repetition_penalty",
    "response_format": "only the server constrains the form of an answer",
    "stop_sequences": "use stop",
    "stop_strings": "use stop",
    "structured_outputs": "only the server constrains the form of an answer",
    "top_logprobs": "use logprobs",
    "truncate_prompt_tokens": "cut the prompt's token ids, and give these as the prompt",
    "typical_p": "use top_p or min_p",
    "use_beam_search": "there is no beam search",
}


@named_arguments(_ELSEWHERE)
@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends.

    :data:`nybble.engine.limits.LIMITS` has the limits of each.

    n: how many sequences continue the prompt. Their seeds are counted up from ``seed``.
    max_tokens: most tokens to generate. None (or −1) for as many as the context length allows; 0
        computes the prompt alone.
    min_tokens: fewest tokens to generate. Until then end tokens cannot be sampled and stop strings
        are not looked for. If a grammar allows nothing but an end, the sequence still ends.
    temperature: 0 is greedy.
    top_p: nucleus sampling; 1 is off.
    top_k: 0 (or −1) is off.
    min_p: lowest probability, relative to the likeliest token's; 0 is off.
    repetition_penalty: divides positive and multiplies negative logits of every token in the
        prompt or output (CTRL, Keskar et al. 2019).
    presence_penalty: subtracted once from the logit of every generated token (OpenAI).
    frequency_penalty: subtracted for each time the token was generated (OpenAI).
    logit_bias: added to the logits, by token id.
    bad_words: a text, or several, which are not generated, alone or after a space. The tokenizer's
        own tokens for a text are blocked; the same text may still appear in other tokens.
    allowed_token_ids: the only tokens that may be sampled, end tokens included; None for all.
    seed: random numbers depend on it and on nothing else. The same seed gives the same text, alone
        and in any batch, if the logits are the same to the last bit: in bfloat16 on the CPU, with
        the compiled kernels, packed weights and a head_dim that is a multiple of 16. Elsewhere
        (other dtypes, GPUs) the last bits of a logit depend on the batch, which seldom changes a
        token; see docs/running.md. None (or −1) draws a seed.
    stop: a string, or several, that end the sequence.
    stop_token_ids: tokens that end the sequence, besides the model's end tokens.
    include_stop_str_in_output: whether what ended the sequence, a stop string or an end token, is
        part of the output text.
    ignore_eos: whether the model's end tokens do not end the sequence.
    skip_special_tokens: whether special tokens are left out of the text.
    shown_special_tokens: ids of special tokens that are in the text although others are left out.
    spaces_between_special_tokens: whether the decoder may put spaces between special tokens that
        follow each other, if they are not left out.
    logprobs: how many alternatives to report per token; None for no logprobs at all.
    logprob_token_ids: report these tokens instead of the likeliest; needs ``logprobs``.
    prompt_logprobs: like ``logprobs``, for the tokens of the prompt. The whole prompt is then
        computed, even if parts are in the prefix cache.

    Lists become tuples. Raises :class:`ParameterError` for a value of another type or out of range.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: str | Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    shown_special_tokens: frozenset[int] = frozenset()
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    logprob_token_ids: Sequence[int] = ()
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for each in fields(self):
            given = getattr(self, each.name)
            if each.name not in LIMITS or (given is None and each.default is None):
                continue
            try:
                taken = LIMITS[each.name].taken(given)
            except OutsideLimitError as error:
                raise ParameterError(each.name, f"{each.name}{error}") from None
            if taken is not given:
                object.__setattr__(self, each.name, taken)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(
                "min_tokens",
                f"min_tokens is {self.min_tokens}, expected at most the {self.max_tokens} of "
                "max_tokens",
            )
        if self.logprob_token_ids and self.logprobs is None:
            raise ParameterError(
                "logprob_token_ids", "logprob_token_ids is allowed only with logprobs"
            )

    def of_sequence(self, index: int) -> Self:
        """Of one of the ``n`` sequences. The first reports the prompt's log probabilities."""
        one = copy(self)  # which has been checked
        changed: dict[str, int | None] = {"n": 1}
        if self.seed is not None:
            changed["seed"] = (self.seed + index + 2**63) % 2**64 - 2**63
        if index:
            changed["prompt_logprobs"] = None
        for name, value in changed.items():
            object.__setattr__(one, name, value)
        return one


class GuideError(RuntimeError):
    """A sequence's grammar cannot continue; the sequence ends with this error.

    parameter: the field that has the grammar; None if that is not known.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class DisallowedTokenError(RuntimeError):
    """A sequence got a token that its guide had excluded: a fault of the engine, not of the
    request. The sequence ends with this error."""


class NoTokenError(RuntimeError):
    """There is no next token for a sequence; the sequence ends with this error."""


class NothingAllowedError(NoTokenError):
    """The request's constraints together exclude every token."""

    def __init__(self) -> None:
        super().__init__(
            "no token may come next: together the request's grammar, allowed_token_ids, bad_words "
            "and min_tokens exclude all of them"
        )


class NotANumberError(NoTokenError):
    """The model's logits for a sequence are NaN or infinite; the sequence ends with this error."""

    def __init__(self) -> None:
        super().__init__(
            "what the model computed for this request is not a number: the weights of the model, "
            "or of the request's adapter, are damaged or overflow"
        )


class Guide(Protocol):
    """Restricts the output of one sequence. Used by the engine thread alone, but for ``fork``."""

    def fork(self) -> Guide:
        """Another at the same place, for another sequence."""
        ...

    def allowed(self) -> Tensor:
        """The tokens that may come next, bool ``(vocab,)`` on the CPU. Never raises."""
        ...

    def accept(self, token: int) -> bool:
        """Advance by a token; returns True if nothing may follow it.

        Raises GuideError, and DisallowedTokenError for a token that was not allowed.
        """
        ...

    def accepts(self, tokens: tuple[int, ...]) -> int:
        """How many of ``tokens`` may come next, one after another. Does not advance."""
        ...

    def allowed_along(self, tokens: tuple[int, ...]) -> list[Tensor]:
        """:meth:`allowed` now, and after each of ``tokens``, which may come. Does not advance."""
        ...


class AdapterMixture(str):
    """Loaded adapters with weights: what they add to the base is multiplied by these and summed.

    The text shows it, such as ``0.7*a + 0.3*b``, as an adapter's name does elsewhere.

    parts: the adapters' names with their weights, sorted by name.
    """

    parts: tuple[tuple[str, float], ...]

    def __new__(cls, weights: Mapping[str, float]) -> AdapterMixture:
        """Raises ParameterError for no adapters, too many, or a weight that is no number or too
        large for a product in 16 bits."""
        if not 0 < len(weights) <= MAX_MIXED_ADAPTERS:
            raise ParameterError(
                "adapter",
                f"a mixture of {len(weights)} adapters, expected 1 to {MAX_MIXED_ADAPTERS}",
            )
        for name, weight in weights.items():
            if not abs(weight) <= MAX_MIXTURE_WEIGHT:
                raise ParameterError(
                    "adapter",
                    f"adapter {name!r} has the weight {weight}, expected at most "
                    f"{MAX_MIXTURE_WEIGHT:.0f} and at least −{MAX_MIXTURE_WEIGHT:.0f}",
                )
        parts = tuple(sorted((name, float(weight)) for name, weight in weights.items()))
        self = super().__new__(cls, " + ".join(f"{weight!r}*{name}" for name, weight in parts))
        self.parts = parts
        return self


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    request_id: must be unique among the requests in flight.
    guide: restricts the output to a grammar; None for free text.
    adapter: the name of a loaded adapter, or a mixture of some; None for the base model.
    tenant: the tenant that the tokens count for.
    weight: tenants share the engine in proportion to this.
    priority: among a tenant's waiting requests the lowest number starts first.
    cache_salt: the prefix cache is shared only among requests with the same salt.
    pooling: if set, the output is the prompt's embedding, or its scores, instead of a continuation.
    prediction: tokens that the output probably has, from which drafts may be made.
    tokens: those that the prompt was read with; None for those that the adapter has when the engine
        takes the request. An adapter that has others by then cannot serve it.

    Raises :class:`ParameterError` for a weight that is not positive and finite, and for parameters
    of several sequences: each is a request, with parameters by :meth:`SamplingParams.of_sequence`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    guide: Guide | None = None
    adapter: str | None = None
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    cache_salt: str = ""
    pooling: Pooling | None = None
    prediction: tuple[int, ...] = ()
    tokens: Tokens | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ParameterError("weight", f"weight is {self.weight}, expected above 0 and finite")
        if self.params.n != 1:
            raise ParameterError("n", f"n is {self.params.n}, but a request is one sequence")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a token before temperature, truncation and penalties.

    top: (token id, log probability) of the alternatives, likeliest first; or of the tokens of
        ``logprob_token_ids``, in their order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptLogprobs:
    """Log probabilities of a prompt's n tokens. The first token has none.

    token_ids: all n tokens.
    logprobs: float32 ``(n - 1,)``.
    ranks: int32 ``(n - 1,)``; 1 is the likeliest token.
    top_logprobs: float32 ``(n - 1, alternatives)``, likeliest first.
    top_ids: int32, of the same shape.
    """

    token_ids: tuple[int, ...]
    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32]

    def tokens(self) -> Iterator[TokenLogprob]:
        """The tokens from the second on."""
        tops = zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        for token, logprob, (ids, values) in zip(
            self.token_ids[1:], self.logprobs.tolist(), tops, strict=True
        ):
            yield TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))


@dataclass(frozen=True)
class RequestOutput:
    """What one engine step added to a request. The last output has a ``finish_reason``.

    text: new text, in whole UTF-8 characters. Text that may be the beginning of a stop string is
        held back until that is known.
    token_ids: the new tokens; there may be tokens without text. Empty if the request asks for no
        tokens (``max_tokens`` 0, or an embedding), which has just one output.
    logprobs: one per new token if asked for, else empty.
    finish_reason: None if more outputs follow.
    prompt_tokens: length of the prompt.
    completion_tokens: tokens generated so far.
    cached_tokens: prompt tokens found in the prefix cache.
    queue_seconds: how long the request waited before its first step.
    prompt_logprobs: of the whole prompt, with the first output, if asked for.
    embedding: float32 ``(hidden,)`` of unit length, if asked for.
    stop_string: the one of ``stop`` that ended it, in the last output.
    draft_tokens, accepted_draft_tokens: verified so far, and those that were what the model says.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_seconds: float = 0.0
    prompt_logprobs: PromptLogprobs | None = None
    embedding: Embedding | None = None
    stop_string: str | None = None
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
