"""Chat completions as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nybble.engine import RequestOutput
from nybble.server.logprobs import Logprobs


class ChatShape:
    """``chat.completion`` and ``chat.completion.chunk``."""

    def __init__(self, id: str, model: str, created: int, logprobs: Logprobs | None) -> None:
        self._head = {"id": id, "created": created, "model": model}
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        name = "chat.completion.chunk" if chunk else "chat.completion"
        return {**self._head, "object": name, "choices": choices}

    def choice(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": "".join(output.text for output in outputs),
                "refusal": None,
            },
            "logprobs": self._content_logprobs(outputs),
            "finish_reason": outputs[-1].finish_reason,
        }

    def chunks(self, index: int, output: RequestOutput) -> Sequence[dict[str, Any]]:
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(_chunk(index, {"role": "assistant", "content": ""}))
        logprobs = self._content_logprobs([output])
        if output.text or output.finish_reason or (logprobs and logprobs["content"]):
            delta = {"content": output.text} if output.text else {}
            chunks.append(_chunk(index, delta, logprobs, output.finish_reason))
        return chunks

    def _content_logprobs(self, outputs: Sequence[RequestOutput]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return {"content": self._logprobs.chat(outputs), "refusal": None}


def _chunk(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
