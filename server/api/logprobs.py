"""Log probabilities in OpenAI's two formats: for chat completions and for completions."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from nybble.engine import PromptLogprobs, RequestOutput, TokenLogprob
from nybble.server.api.token_bytes import TokenBytes

# What OpenAI reports for an impossible token; JSON has no infinity.
_LOWEST = -9999.0


class Logprobs:
    """Writes log probabilities.

    ends: end tokens, which are not part of the text and are not reported.
    as_token_ids: whether to write a token as ``token_id:5``; tokens may have the same text.
    """

    def __init__(
        self, tokens: TokenBytes, ends: Container[int], *, as_token_ids: bool = False
    ) -> None:
        self._tokens = tokens
        self._ends = ends
        self._as_token_ids = as_token_ids

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_token_ids else self._tokens.text(token_id)

    def chat(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """``choices[].logprobs.content``."""
        return [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(other, logprob) for other, logprob in token.top],
            }
            for token in self._reported(outputs)
        ]

    def completion(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """``choices[].logprobs``, with ``lengths`` in characters instead of ``text_offset``."""
        body: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "lengths": [],
        }
        for token in self._reported(outputs):
            self._append(body, token, token.top)
        return body

    def prompt(self, prompt: PromptLogprobs, alternatives: int) -> dict[str, Any]:
        """The same for an echoed prompt; its first token has no log probability."""
        first = prompt.token_ids[0]
        body: dict[str, Any] = {
            "tokens": [self._text(first)],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "lengths": [_characters(self._tokens.of(first))],
        }
        for token in prompt.tokens():
            self._append(body, token, token.top[:alternatives])
        return body

    def by_id(self, prompt: PromptLogprobs, alternatives: int) -> list[dict[str, Any] | None]:
        """A prompt's logprobs in vLLM's format: by token id, each with its rank."""

        def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
            return {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": self._tokens.text(token_id),
            }

        found: list[dict[str, Any] | None] = [None]
        for token, rank in zip(prompt.tokens(), prompt.ranks.tolist(), strict=True):
            top = enumerate(token.top[:alternatives], 1)
            entries = {str(other): entry(other, value, at) for at, (other, value) in top}
            own = {str(token.token_id): entry(token.token_id, token.logprob, rank)}
            found.append(own | entries)
        return found

    def _append(
        self, body: dict[str, Any], token: TokenLogprob, top: Sequence[tuple[int, float]]
    ) -> None:
        text = self._text(token.token_id)
        body["tokens"].append(text)
        body["token_logprobs"].append(_finite(token.logprob))
        # The chosen token is listed even if it is not one of the likeliest, and first, as in vLLM.
        found = {text: _finite(token.logprob)}
        for other, logprob in top:
            found.setdefault(self._text(other), _finite(logprob))
        body["top_logprobs"].append(found)
        body["lengths"].append(_characters(self._tokens.of(token.token_id)))

    def _reported(self, outputs: Sequence[RequestOutput]) -> Iterator[TokenLogprob]:
        for output in outputs:
            for token in output.logprobs:
                if output.finish_reason != "stop" or token.token_id not in self._ends:
                    yield token

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokens.of(token_id)),
        }


def _characters(data: bytes) -> int:
    """How many characters begin in ``data``; a token may hold only part of one."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
