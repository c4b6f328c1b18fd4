"""What chat completions and completions have in common: choices in an envelope."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from nybble.engine import RequestOutput
from nybble.server.api.generation import Usage
from nybble.server.api.respond import Event
from nybble.server.http.errors import ApiError


class ChoicesShape(ABC):
    """See :class:`nybble.server.api.respond.Shape`."""

    terminator: bytes | None = b"[DONE]"

    def __init__(self, *, include_usage: bool) -> None:
        self._include_usage = include_usage

    @abstractmethod
    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """The body around choices: of a whole response, or of one event."""

    @abstractmethod
    def choice(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """A finished sequence."""

    @abstractmethod
    def chunks(self, index: int, output: RequestOutput) -> Sequence[dict[str, Any]]:
        """The choices that one output adds to a stream."""

    def whole(self, outputs: Sequence[Sequence[RequestOutput]], usage: Usage) -> dict[str, Any]:
        choices = [self.choice(index, sequence) for index, sequence in enumerate(outputs)]
        return self.envelope(choices, chunk=False) | {"usage": _usage(usage)}

    def events(self, index: int, output: RequestOutput) -> Sequence[Event]:
        # OpenAI sends a null usage with every event before the one that carries it.
        extra: dict[str, Any] = {"usage": None} if self._include_usage else {}
        return [
            (None, self.envelope([choice], chunk=True) | extra)
            for choice in self.chunks(index, output)
        ]

    def last_events(self, usage: Usage) -> Sequence[Event]:
        if not self._include_usage:
            return []
        return [(None, self.envelope([], chunk=True) | {"usage": _usage(usage)})]

    def failure(self, error: ApiError) -> Event:
        return None, error.body()


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
