"""/v1/responses as OpenAI writes it: output items, and the events they arrive in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

from nybble.engine import RequestOutput, SamplingParams
from nybble.server.api.answer_form import AnswerForm
from nybble.server.api.generation import Usage
from nybble.server.api.logprobs import Logprobs
from nybble.server.api.output.events import Arguments, Call, Reasoning, Text
from nybble.server.api.respond import ServerSentEvent
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.http.errors import ApiError


class ResponsesFormatter:
    """See :class:`nybble.server.api.respond.Formatter`. One sequence each.

    response: as far as it is written.
    logprobs: None if none are asked for. Those of a message's tokens are reported with the text
        which the tokens complete; those of reasoning and calls are not reported, as OpenAI does.
    """

    terminator: bytes | None = None

    def __init__(
        self,
        id: str,
        body: ResponsesRequest,
        created: int,
        params: SamplingParams,
        form: AnswerForm,
        logprobs: Logprobs | None = None,
        *,
        ended: Callable[[dict[str, Any]], None],
    ) -> None:
        """ended: called with the response once it is written, or has failed."""
        self._ended = ended
        self._parser = form.parser()
        self._logprobs = logprobs
        # Log probabilities whose text is still to come, and those of the newest output.
        self._unsent: list[dict[str, Any]] = []
        self._newest: list[dict[str, Any]] = []
        self._events: list[ServerSentEvent] = []
        self._sequence = 0
        self._begun = False
        self._item: dict[str, Any] | None = None  # the output item being written
        text = {"format": {"type": "text"}}
        if body.text is not None and body.text.format is not None:
            text["format"] = body.text.format.model_dump(by_alias=True, exclude_none=True)
        self.response: dict[str, Any] = {
            "id": id,
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "background": bool(body.background),
            "reasoning": {
                "effort": None if body.reasoning is None else body.reasoning.effort,
                "summary": None,
            },
            "temperature": params.temperature,
            "text": text,
            "tool_choice": _plain(body.tool_choice) or "auto",
            "tools": [
                {"parameters": None, "strict": None, **tool.model_dump(exclude_none=True)}
                for tool in body.tools or ()
            ],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
        }

    def whole(self, outputs: Sequence[Sequence[RequestOutput]], usage: Usage) -> dict[str, Any]:
        for output in outputs[0]:
            self.events(0, output, usage)
        self.last_events(usage)
        return self.response

    def events(self, index: int, output: RequestOutput, usage: Usage) -> Sequence[ServerSentEvent]:
        if not self._begun:
            self._begun = True
            self._tell("response.created", response=self.response | {"output": []})
            self._tell("response.in_progress", response=self.response | {"output": []})
        if self._logprobs is not None:
            self._newest = self._logprobs.chat([output])
            self._unsent += self._newest
        read = self._parser.feed(output.text, len(output.token_ids))
        if output.finish_reason is not None:
            read += self._parser.finish()
        for event in read:
            if isinstance(event, Text):
                self._text(event.text)
            elif isinstance(event, Reasoning):
                self._think(event.text)
            elif isinstance(event, Call):
                self._open_call(event.name)
            else:
                self._arguments(event)
        if output.finish_reason is not None:
            complete = output.finish_reason == "stop"
            items = self.response["output"]
            thoughts_alone = all(item["type"] == "reasoning" for item in items)
            # An empty answer is an empty message.
            if not items or (thoughts_alone and complete):
                self._open_message()
            assert self._item is not None
            if self._item["type"] == "message":  # tokens that are no text, such as markers
                self._item["content"][0]["logprobs"] += self._unsent
            self._close_item("completed" if complete else "incomplete")
            self.response["status"] = "completed" if complete else "incomplete"
            if not complete:
                self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return self._take()

    def last_events(self, usage: Usage) -> Sequence[ServerSentEvent]:
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                # Every computed prompt token goes into the prefix cache.
                "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._parser.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            **usage.draft_details,
        }
        self._ended(self.response)
        self._tell(f"response.{self.response['status']}", response=self.response)
        return self._take()

    def failure(self, error: ApiError) -> ServerSentEvent:
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": error.message}
        self._ended(self.response)
        self._tell("response.failed", response=self.response)
        return self._take()[-1]

    @staticmethod
    def lost(error: ApiError) -> ServerSentEvent:
        """OpenAI's event for an error of the stream; its number among the others is not known."""
        body = {"code": error.code, "message": error.message, "param": None, "sequence_number": 0}
        return "error", {"type": "error", **body}

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._item is None or self._item["type"] != "message":
            self._open_message()
        assert self._item is not None
        part, logprobs = self._item["content"][0], self._unsent
        part["text"] += text
        part["logprobs"] += logprobs
        self._unsent = []
        self._tell_part("response.output_text.delta", delta=text, logprobs=logprobs)

    def _think(self, text: str) -> None:
        if self._item is None or self._item["type"] != "reasoning":
            self._close_item("completed")
            self._open_item("rs", type="reasoning", summary=[], content=[])
            self._open_part({"type": "reasoning_text", "text": ""})
        assert self._item is not None
        self._item["content"][0]["text"] += text
        self._unsent = []
        self._tell_part("response.reasoning_text.delta", delta=text)

    def _open_message(self) -> None:
        if self._item is not None and self._item["type"] == "reasoning":
            self._unsent = list(self._newest)  # not those of the marker behind the reasoning
        self._close_item("completed")
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open_item("msg", type="message", role="assistant", content=[])
        self._open_part(part)

    def _open_part(self, part: dict[str, Any]) -> None:
        told = part | {"logprobs": []} if "logprobs" in part else dict(part)
        self._tell_part("response.content_part.added", part=told)
        assert self._item is not None
        self._item["content"] = [part]

    def _open_call(self, name: str) -> None:
        self._close_item("completed")
        self._unsent = []
        call = {"call_id": f"call_{uuid4().hex[:24]}", "name": name, "arguments": ""}
        self._open_item("fc", type="function_call", **call)

    def _arguments(self, event: Arguments) -> None:
        assert self._item is not None
        self._unsent = []
        self._item["arguments"] += event.text
        self._tell_item("response.function_call_arguments.delta", delta=event.text)

    def _open_item(self, prefix: str, **fields: Any) -> None:
        self._item = {"id": f"{prefix}_{uuid4().hex}", "status": "in_progress", **fields}
        self.response["output"].append(self._item)
        self._tell("response.output_item.added", output_index=self._index(), item=dict(self._item))

    def _close_item(self, status: str) -> None:
        if self._item is None:
            return
        self._item["status"] = status
        if self._item["type"] == "message":
            (part,) = self._item["content"]
            self._tell_part(
                "response.output_text.done", text=part["text"], logprobs=part["logprobs"]
            )
            self._tell_part("response.content_part.done", part=part)
        elif self._item["type"] == "reasoning":
            (part,) = self._item["content"]
            self._tell_part("response.reasoning_text.done", text=part["text"])
            self._tell_part("response.content_part.done", part=part)
        else:
            self._tell_item(
                "response.function_call_arguments.done",
                name=self._item["name"],
                arguments=self._item["arguments"],
            )
        self._tell("response.output_item.done", output_index=self._index(), item=self._item)
        self._item = None

    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _tell_part(self, kind: str, /, **fields: Any) -> None:
        self._tell_item(kind, content_index=0, **fields)

    def _tell_item(self, kind: str, /, **fields: Any) -> None:
        assert self._item is not None
        self._tell(kind, item_id=self._item["id"], output_index=self._index(), **fields)

    def _tell(self, kind: str, /, **fields: Any) -> None:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._events.append((kind, event))
        self._sequence += 1

    def _take(self) -> Sequence[ServerSentEvent]:
        taken, self._events = self._events, []
        return taken


def _plain(tool_choice: Any) -> Any:
    return tool_choice.model_dump() if hasattr(tool_choice, "model_dump") else tool_choice
