"""/v1/messages as Anthropic writes it: content blocks, and the events they arrive in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from pydantic_core import from_json

from nybble.engine import RequestOutput
from nybble.server.api.answer_form import AnswerForm
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.generation import Usage
from nybble.server.api.output.events import Arguments, Call, Reasoning, Text
from nybble.server.api.respond import ServerSentEvent
from nybble.server.http.errors import ApiError

# The field of a block which its deltas fill, and the type of the deltas.
_DELTAS = {
    "text": ("text", "text_delta"),
    "thinking": ("thinking", "thinking_delta"),
    "tool_use": ("partial_json", "input_json_delta"),
}


class MessagesFormatter:
    """See :class:`nybble.server.api.respond.Formatter`. One sequence each."""

    terminator: bytes | None = None

    def __init__(self, id: str, body: ChatRequest, form: AnswerForm, *, limited: bool) -> None:
        """body: the request as a chat completion. limited: whether the answer ends at its
        max_tokens, before the end of the context."""
        self._at_length = "max_tokens" if limited else "model_context_window_exceeded"
        self._parser = form.parser()
        self._shows_reasoning = body.include_reasoning is not False
        self._events: list[ServerSentEvent] = []
        self._blocks: list[dict[str, Any]] = []
        self._open = False  # whether the last block is still being written
        self._begun = False
        self._arguments = ""  # of the call being written
        self._message: dict[str, Any] = {
            "id": id,
            "type": "message",
            "role": "assistant",
            "model": body.model,
            "content": self._blocks,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def whole(self, outputs: Sequence[Sequence[RequestOutput]], usage: Usage) -> dict[str, Any]:
        for output in outputs[0]:
            self.events(0, output, usage)
        return self._message | {"usage": _usage(usage) | usage.draft_details}

    def events(self, index: int, output: RequestOutput, usage: Usage) -> Sequence[ServerSentEvent]:
        if not self._begun:
            self._begun = True
            # The tokens of the answer are counted at its end.
            counts = _usage(usage) | {"output_tokens": 0}
            self._tell("message_start", message=self._message | {"content": [], "usage": counts})
        read = self._parser.feed(output.text, len(output.token_ids))
        if output.finish_reason is not None:
            read += self._parser.finish()
        for event in read:
            if isinstance(event, Text):
                self._write("text", event.text)
            elif isinstance(event, Reasoning):
                if self._shows_reasoning:
                    self._write("thinking", event.text)
            elif isinstance(event, Call):
                self._close_block()
                id = f"toolu_{uuid4().hex[:24]}"
                self._open_block({"type": "tool_use", "id": id, "name": event.name, "input": {}})
            else:
                self._argue(event)
        if output.finish_reason is not None:
            self._close_block()
            self._message["stop_reason"] = self._stop_reason(output)
            self._message["stop_sequence"] = output.stop_string
        taken, self._events = self._events, []
        return taken

    def last_events(self, usage: Usage) -> Sequence[ServerSentEvent]:
        delta = {name: self._message[name] for name in ("stop_reason", "stop_sequence")}
        self._tell("message_delta", delta=delta, usage=_usage(usage) | usage.draft_details)
        self._tell("message_stop")
        return self._events

    def failure(self, error: ApiError) -> ServerSentEvent:
        return "error", error.anthropic_body()

    lost = failure

    def _stop_reason(self, output: RequestOutput) -> str:
        if output.finish_reason == "length":
            return self._at_length
        if output.stop_string is not None:
            return "stop_sequence"
        return "tool_use" if self._parser.calls else "end_turn"

    def _write(self, kind: str, text: str) -> None:
        if not self._open or self._blocks[-1]["type"] != kind:
            self._close_block()
            block = {"type": kind, kind: ""}
            # A signature proves to Anthropic's own server that it has written the text.
            self._open_block(block | {"signature": ""} if kind == "thinking" else block)
        self._blocks[-1][kind] += text
        self._delta(kind, text)

    def _argue(self, event: Arguments) -> None:
        self._arguments += event.text
        self._delta("tool_use", event.text)

    def _open_block(self, block: dict[str, Any]) -> None:
        self._blocks.append(block)
        self._open, self._arguments = True, ""
        self._tell("content_block_start", index=self._index(), content_block=dict(block))

    def _close_block(self) -> None:
        if not self._open:
            return
        self._open = False
        if self._blocks[-1]["type"] == "tool_use":
            self._blocks[-1]["input"] = _input(self._arguments)
        self._tell("content_block_stop", index=self._index())

    def _delta(self, kind: str, text: str) -> None:
        name, of = _DELTAS[kind]
        self._tell("content_block_delta", index=self._index(), delta={"type": of, name: text})

    def _index(self) -> int:
        return len(self._blocks) - 1

    def _tell(self, kind: str, /, **fields: Any) -> None:
        self._events.append((kind, {"type": kind, **fields}))


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as an object: of an answer that was cut short as much as can be read."""
    try:
        value = from_json(arguments or "{}", allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        # Anthropic counts the tokens that were read from the cache apart.
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
