"""What the responses of chat completions and completions share: choices in an envelope."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from nybble.engine import RequestOutput
from nybble.server.api.generation import Usage
from nybble.server.api.respond import ServerSentEvent
from nybble.server.api.schema import Sampling
from nybble.server.http.errors import ApiError


class ChoicesFormatter(ABC):
    """See :class:`nybble.server.api.respond.Formatter`."""

    terminator: bytes | None = b"[DONE]"

    def __init__(self, body: Sampling, prompts: Sequence[tuple[int, ...]]) -> None:
        """prompts: token ids; sequence ``i`` continues prompt ``i // n``."""
        self._include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage
        self._n = body.sequences
        self._prompts = prompts if body.return_token_ids else None

    @property
    def reasoning_tokens(self) -> int | None:
        """How many of the tokens so far were reasoning; None if that is not told apart."""
        return None

    @abstractmethod
    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """A body with these choices: a whole response, or one event if ``chunk``."""

    @abstractmethod
    def choice(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The choice for a finished sequence."""

    @abstractmethod
    def chunks(self, index: int, output: RequestOutput) -> Sequence[dict[str, Any]]:
        """The choices that one output adds to a stream."""

    def whole(self, outputs: Sequence[Sequence[RequestOutput]], usage: Usage) -> dict[str, Any]:
        choices = [self.choice(index, sequence) for index, sequence in enumerate(outputs)]
        return self.envelope(choices, chunk=False) | {"usage": self._usage(usage)}

    def events(self, index: int, output: RequestOutput, usage: Usage) -> Sequence[ServerSentEvent]:
        events: list[ServerSentEvent] = []
        for choice in self.chunks(index, output):
            body = self.envelope([choice], chunk=True)
            if self._include_usage:
                # OpenAI sends a null usage in every event but the last.
                body["usage"] = self._usage(usage) if self._continuous_usage else None
            if body.get("usage") and "role" in choice.get("delta", ()):
                # It comes before the sequence's first tokens, which this output has.
                body["usage"]["completion_tokens"] -= output.completion_tokens
                body["usage"]["total_tokens"] -= output.completion_tokens
            events.append((None, body))
        return events

    def prompt_token_ids(self, index: int) -> dict[str, Any]:
        """The field for a sequence's prompt, if it is asked for."""
        if self._prompts is None:
            return {}
        return {"prompt_token_ids": self._prompts[index // self._n]}

    def token_ids(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The field for these outputs' tokens, if it is asked for."""
        if self._prompts is None:
            return {}
        return {"token_ids": [token for output in outputs for token in output.token_ids]}

    @property
    def no_token_ids(self) -> dict[str, Any]:
        """The field for a chunk that only says something else, if it is asked for."""
        return self.token_ids([])

    def last_events(self, usage: Usage) -> Sequence[ServerSentEvent]:
        if not self._include_usage:
            return []
        return [(None, self.envelope([], chunk=True) | {"usage": self._usage(usage)})]

    def failure(self, error: ApiError) -> ServerSentEvent:
        return None, error.body()

    lost = failure

    def _usage(self, usage: Usage) -> dict[str, Any]:
        details: dict[str, Any] = {}
        if (reasoning := self.reasoning_tokens) is not None:
            details["reasoning_tokens"] = reasoning
        if (predicted := usage.predicted_tokens) is not None:
            accepted, rejected = predicted
            details["accepted_prediction_tokens"] = accepted
            details["rejected_prediction_tokens"] = rejected
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            **({"completion_tokens_details": details} if details else {}),
            **usage.draft_details,
        }
