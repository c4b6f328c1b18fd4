"""Chat completions as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from nybble.engine import RequestOutput
from nybble.server.api.answer_form import AnswerForm
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.choices import ChoicesFormatter
from nybble.server.api.generation import Usage
from nybble.server.api.logprobs import Logprobs
from nybble.server.api.output.events import (
    Arguments,
    Call,
    OutputParser,
    ParsedDelta,
    Reasoning,
    Text,
)


class ChatFormatter(ChoicesFormatter):
    """``chat.completion`` and ``chat.completion.chunk``, with reasoning and calls parsed from text.

    Reasoning has two names: ``reasoning`` is vLLM's and OpenRouter's, ``reasoning_content`` that of
    DeepSeek, SGLang and llama.cpp. Clients read one of them.

    form: of the answers.
    prompts: the token ids of the one prompt.
    echo: text that every answer begins with, before the generated text.
    """

    def __init__(
        self,
        id: str,
        body: ChatRequest,
        created: int,
        logprobs: Logprobs | None,
        form: AnswerForm,
        prompts: Sequence[tuple[int, ...]],
        echo: str = "",
    ) -> None:
        super().__init__(body, prompts)
        self._echo = echo
        self._head = {"id": id, "created": created, "model": body.model}
        self._logprobs = logprobs if body.logprobs else None
        self._of_prompt = logprobs if body.prompt_logprobs is not None else None
        self._prompt_alternatives = body.prompt_logprobs or 0
        self._form = form
        self._shows_reasoning = body.include_reasoning is not False
        self._parsers: dict[int, OutputParser] = {}

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        name = "chat.completion.chunk" if chunk else "chat.completion"
        return {**self._head, "object": name, "choices": choices}

    def whole(self, outputs: Sequence[Sequence[RequestOutput]], usage: Usage) -> dict[str, Any]:
        body = super().whole(outputs, usage) | self.prompt_token_ids(0)
        body["prompt_logprobs"] = None  # always there, as in vLLM
        prompt = outputs[0][0].prompt_logprobs
        if self._of_prompt is not None and prompt is not None:
            body["prompt_logprobs"] = self._of_prompt.by_id(prompt, self._prompt_alternatives)
        return body

    @property
    def reasoning_tokens(self) -> int | None:
        if not self._form.reasons:
            return None
        return sum(parser.reasoning_tokens for parser in self._parsers.values())

    def choice(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        parser = self._parsers[index] = self._form.parser()
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self._echo,
            "refusal": None,
        }
        calls: list[dict[str, Any]] = []
        reasoning = ""
        for event in (event for output in outputs for event in self._events(parser, output)):
            if isinstance(event, Text):
                message["content"] += event.text
            elif isinstance(event, Reasoning):
                reasoning += event.text
            elif isinstance(event, Call):
                calls.append(_call(event.name))
            else:
                calls[-1]["function"]["arguments"] += event.text
        if reasoning:
            message |= _reasoning(reasoning)
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        return {
            "index": index,
            "message": message,
            "logprobs": self._content_logprobs(outputs),
            "finish_reason": self._finish_reason(outputs[-1], parser),
            **self.token_ids(outputs),
        }

    def chunks(self, index: int, output: RequestOutput) -> Sequence[dict[str, Any]]:
        begins = index not in self._parsers
        deltas: list[dict[str, Any]] = []
        if begins:
            self._parsers[index] = self._form.parser()
            deltas.append({"role": "assistant", "content": ""})
            if self._echo:
                deltas.append({"content": self._echo})
        parser = self._parsers[index]
        last = output.finish_reason is not None
        said = [_delta(event) for event in self._events(parser, output)]
        logprobs, token_ids = self._content_logprobs([output]), self.token_ids([output])
        if not said and ((logprobs and logprobs["content"]) or token_ids.get("token_ids")):
            said.append({})
        deltas += said
        chunks = [_chunk(index, delta) | self.no_token_ids for delta in deltas]
        if chunks:
            chunks[-1]["logprobs"] = logprobs
            chunks[-1] |= token_ids
        if begins and chunks:
            chunks[0] |= self.prompt_token_ids(index)
        if last:  # in a chunk of its own, as OpenAI does
            chunks.append(_chunk(index, {}) | self.no_token_ids)
            chunks[-1]["finish_reason"] = self._finish_reason(output, parser)
        return chunks

    def _events(self, parser: OutputParser, output: RequestOutput) -> list[ParsedDelta]:
        """What an output adds to the answer, as far as it is shown."""
        events = parser.feed(output.text, len(output.token_ids))
        if output.finish_reason is not None:
            events += parser.finish()
        if self._shows_reasoning:
            return events
        return [event for event in events if not isinstance(event, Reasoning)]

    def _finish_reason(self, output: RequestOutput, parser: OutputParser) -> str | None:
        tools = self._form.tools
        if output.finish_reason == "stop" and parser.calls and tools and not tools.named:
            return "tool_calls"
        return output.finish_reason

    def _content_logprobs(self, outputs: Sequence[RequestOutput]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return {"content": self._logprobs.chat(outputs), "refusal": None}


def _delta(event: ParsedDelta) -> dict[str, Any]:
    if isinstance(event, Text):
        return {"content": event.text}
    if isinstance(event, Reasoning):
        return _reasoning(event.text)
    if isinstance(event, Arguments):
        function = {"arguments": event.text}
        return {"tool_calls": [{"index": event.index, "function": function}]}
    return {"tool_calls": [{"index": event.index, **_call(event.name)}]}


def _reasoning(text: str) -> dict[str, Any]:
    return {"reasoning": text, "reasoning_content": text}


def _call(name: str) -> dict[str, Any]:
    return {
        "id": f"call_{uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": ""},
    }


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
