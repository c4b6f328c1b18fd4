"""What a caller asks of the engine and what it gets back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Embedding = NDArray[np.float32]
Pooling = Literal["last", "mean"]

FinishReason = Literal["stop", "length"]

MAX_LOGPROBS = 20


class ParameterError(ValueError):
    """A request the engine cannot honour; ``parameter`` names the offending field."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class ContextLengthError(ParameterError):
    """A prompt and the output it asks for are together longer than a sequence may be."""


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


class EngineStoppedError(RuntimeError):
    """The engine is not running: it is shutting down, or has failed and takes no requests."""


class EngineFailedError(EngineStoppedError):
    """The engine failed while it had the request; the message names the cause."""


class OutOfMemoryError(RuntimeError):
    """There was no memory left to compute the request; the engine goes on with others."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Raises :class:`ParameterError`.

    max_tokens: tokens to generate at most; None for as many as the context length allows, 0 to
        compute the prompt alone.
    min_tokens: tokens to generate at least: before, no end token comes and no stop string is looked
        for. A grammar that can only end there ends all the same.
    temperature: 0 is greedy.
    top_k: 0 is off. top_p, min_p: nucleus and minimum probability relative to the likeliest token.
    repetition_penalty: divides positive and multiplies negative logits of every token in the
        prompt or output (CTRL, Keskar et al. 2019). presence_penalty and frequency_penalty are
        subtracted from the logits of generated tokens, once and per occurrence (OpenAI).
    logit_bias: added to the logits by token id.
    seed: the same seed gives the same text, whatever else is in the batch. None draws one.
    bad_words: texts that do not come, alone or after a space; found by their tokens, so that a
        text may still come in other tokens than the tokenizer's own for it.
    allowed_token_ids: the only tokens that may come, end tokens among them; None for all.
    stop: strings that end the sequence.
    include_stop_str_in_output: whether what ended the sequence, a stop string or an end token, is
        part of the output text.
    skip_special_tokens: whether special tokens are left out of the text.
    spaces_between_special_tokens: whether the decoder may put spaces between special tokens that
        follow each other, if they are not left out.
    logprobs: how many alternatives to report per token (0–20), None for no logprobs at all.
    logprob_token_ids: report these tokens instead of the likeliest, with ``logprobs``.
    prompt_logprobs: the same for the tokens of the prompt. All of them are then computed, whatever
        the prefix cache holds.
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
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        def require(condition: bool, parameter: str, expected: str) -> None:
            if not condition:
                found = getattr(self, parameter)
                raise ParameterError(parameter, f"{parameter} is {found}, expected {expected}")

        require(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "0 or more")
        require(self.min_tokens >= 0, "min_tokens", "0 or more")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(
                "min_tokens",
                f"min_tokens is {self.min_tokens}, expected at most the {self.max_tokens} of "
                "max_tokens",
            )
        require(0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        require(self.top_k >= 0, "top_k", "0 (off) or more")
        require(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        require(
            0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "between 0.01 and 100"
        )
        require(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ParameterError(
                    "logit_bias",
                    f"logit_bias of token {token} is {bias}, expected between -100 and 100",
                )
        require(all(self.stop), "stop", "non-empty strings")
        require(all(map(str.strip, self.bad_words)), "bad_words", "strings with more than spaces")
        require(self.allowed_token_ids != (), "allowed_token_ids", "at least one token id")
        if self.logprob_token_ids and self.logprobs is None:
            raise ParameterError(
                "logprob_token_ids", "logprob_token_ids is allowed only with logprobs"
            )
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            require(
                wanted is None or 0 <= wanted <= MAX_LOGPROBS,
                name,
                f"between 0 and {MAX_LOGPROBS}",
            )


class GuideError(RuntimeError):
    """A guide cannot go on; its sequence ends with this error."""


class NoTokenError(RuntimeError):
    """There is no next token for a sequence; the sequence ends with this error."""


class NothingAllowedError(NoTokenError):
    """What a request demands of the next token excludes all of them."""

    def __init__(self) -> None:
        super().__init__(
            "no token may come next: together the request's grammar, allowed_token_ids, bad_words "
            "and min_tokens exclude all of them"
        )


class NotANumberError(NoTokenError):
    """What the model computed for a sequence is no number; the sequence ends with this error."""

    def __init__(self) -> None:
        super().__init__(
            "what the model computed for this request is no number; is its adapter sound?"
        )


class Guide(Protocol):
    """Restricts what one sequence says. Used by the engine thread alone."""

    def allowed(self) -> Tensor:
        """The tokens that may come next, bool ``(vocab,)`` on the CPU. Never raises."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by a token; True where nothing may follow it. Raises GuideError."""
        ...


@dataclass(frozen=True)
class Request:
    """One prompt to continue. ``request_id`` must be unique among those in flight.

    adapter: the name of a loaded adapter; None for the base model.
    tenant: whom the tokens are served to; tenants share the engine in proportion to ``weight``.
    priority: of a tenant's waiting requests the lowest begins first, whenever it came.
    cache_salt: the prefix cache is shared only with requests that have the same.
    pooling: asks for the prompt's embedding in place of a continuation.
    Raises :class:`ParameterError` for a weight that is not positive.
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

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ParameterError("weight", f"weight is {self.weight}, expected above 0 and finite")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a token before temperature, truncation and penalties.

    top: the likeliest alternatives, likeliest first, as (token id, log probability); or the tokens
        of ``logprob_token_ids``, in their order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptLogprobs:
    """Log probabilities of a prompt's tokens, one row for each but the first, which has none.

    logprobs: float32 ``(n - 1,)``. ranks: int32 ``(n - 1,)``, 1 for the likeliest token.
    top_logprobs, top_ids: float32 and int32 ``(n - 1, alternatives)``, likeliest first.
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
    """What one engine step added to a request; the last one carries ``finish_reason``.

    text: new text, whole UTF-8 characters only; text that may turn out to be the beginning of a
        stop string is held back until that is settled.
    token_ids: the new tokens (an output may carry tokens and no text); none where the request asks
        for none, which has one output.
    logprobs: one per new token if asked for, else empty.
    completion_tokens: generated so far. cached_tokens: prompt tokens found in the prefix cache.
    queue_seconds: how long the request waited before it was first computed.
    prompt_logprobs: of the whole prompt, with the first output, if asked for.
    embedding: float32 ``(hidden,)`` of unit length, if asked for.
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
