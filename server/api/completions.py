"""Text completions as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nybble.engine import RequestOutput
from nybble.server.api.choices import ChoicesShape
from nybble.server.api.logprobs import Logprobs


class CompletionShape(ChoicesShape):
    """``text_completion``; echoes: a text for each sequence to begin with, or none."""

    def __init__(
        self,
        id: str,
        model: str,
        created: int,
        logprobs: Logprobs | None,
        echoes: Sequence[str] | None,
        *,
        include_usage: bool,
    ) -> None:
        super().__init__(include_usage=include_usage)
        self._head = {"id": id, "object": "text_completion", "created": created, "model": model}
        self._logprobs = logprobs
        self._echoes = echoes
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        return {**self._head, "choices": choices}

    def choice(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        text = self._echo(index) + "".join(output.text for output in outputs)
        return self._choice(index, text, outputs)

    def chunks(self, index: int, output: RequestOutput) -> Sequence[dict[str, Any]]:
        text = output.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._echo(index) + text
        choice = self._choice(index, text, [output])
        logprobs = choice["logprobs"]
        wanted = text or output.finish_reason or (logprobs and logprobs["tokens"])
        return [choice] if wanted else []

    def _echo(self, index: int) -> str:
        return self._echoes[index] if self._echoes is not None else ""

    def _choice(self, index: int, text: str, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs.completion(outputs, self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + sum(
                len(token) for token in logprobs["tokens"]
            )
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": outputs[-1].finish_reason,
        }
