"""Log probabilities in the two shapes OpenAI's API has."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from nybble.engine import RequestOutput, TokenLogprob
from nybble.server.api.token_bytes import TokenBytes

# What OpenAI reports for "practically impossible"; JSON has no infinity.
_LOWEST = -9999.0


class Logprobs:
    """ends: tokens that end a sequence, which are not part of its text and are not reported."""

    def __init__(self, tokens: TokenBytes, ends: Container[int]) -> None:
        self._tokens = tokens
        self._ends = ends

    def chat(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """``choices[].logprobs.content``."""
        return [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(other, logprob) for other, logprob in token.top],
            }
            for token in self._reported(outputs)
        ]

    def completion(self, outputs: Sequence[RequestOutput], offset: int) -> dict[str, Any]:
        """``choices[].logprobs``; ``offset``: characters of the tokens that came before."""
        body: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in self._reported(outputs):
            text = self._tokens.text(token.token_id)
            body["tokens"].append(text)
            body["token_logprobs"].append(_finite(token.logprob))
            # The chosen token is among them even where it is not one of the likeliest.
            top = {self._tokens.text(other): _finite(logprob) for other, logprob in token.top}
            body["top_logprobs"].append(top | {text: _finite(token.logprob)})
            body["text_offset"].append(offset)
            offset += len(text)
        return body

    def _reported(self, outputs: Sequence[RequestOutput]) -> Iterator[TokenLogprob]:
        for output in outputs:
            for token in output.logprobs:
                if output.finish_reason != "stop" or token.token_id not in self._ends:
                    yield token

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokens.text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokens.of(token_id)),
        }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
