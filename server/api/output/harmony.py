"""Harmony, the format of gpt-oss: an answer consists of messages in channels.

``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>``,
and a call is ``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>``.
Its source is OpenAI's description of the format. ``<|return|>`` and ``<|call|>`` are end tokens of
the model, which are not in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nybble.server.api.output.events import Arguments, Call, ParsedDelta, Reasoning, Text
from nybble.server.api.output.markers import MarkerTokens, first_of, quoted, unsettled

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
# What begins and ends reasoning, and what is written to end it early: the next channel is to come.
OPEN, CLOSE = f"{CHANNEL}analysis{MESSAGE}", END
CLOSING, BARRED = f"{END}{START}assistant{CHANNEL}", "analysis"
# What the answer itself is written behind.
FINAL = f"{CHANNEL}final{MESSAGE}"

_ENDS = (END, CALL, RETURN, START)
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(rf"{re.escape(CHANNEL)}\s*([a-z]+)")


class HarmonyParser:
    """See :class:`nybble.server.api.output.events.OutputParser`.

    The analysis is reasoning. What is addressed to a function is a call. The final channel is the
    answer, and so is commentary that is addressed to nobody: it tells the user what comes.
    """

    def __init__(self, prompt: str, *, calls: bool, split: bool = True) -> None:
        """prompt: what is continued.

        calls: whether the request offers tools.
        split: whether reasoning is told apart; else it is content.
        """
        self._takes_calls = calls
        self._split = split
        self._state: Literal["header", "body"] = "header"
        self._kind: Literal["reasoning", "text", "call"] = "text"
        self._buffer = ""
        self._fresh = True  # whether nothing of this message has been returned
        self._spoken = False  # whether there is text of an earlier message
        self._tokens = self._undecided = 0
        self._thought = False  # whether there is reasoning of an earlier message
        self._arguments = False
        self.calls = 0
        begun = prompt[prompt.rfind(START) :]
        if MESSAGE in begun and END not in begun:  # the prompt ends inside a message
            self._buffer = begun[: begun.index(MESSAGE) + len(MESSAGE)]
            self._header([])
            self._fresh = False

    @property
    def reasoning_tokens(self) -> int:
        return self._tokens

    def feed(self, text: str, tokens: int = 0) -> list[ParsedDelta]:
        if self._state == "header":
            self._undecided += tokens
        elif self._kind == "reasoning":
            self._tokens += tokens
        self._buffer += text
        events: list[ParsedDelta] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[ParsedDelta]:
        held, self._buffer = self._buffer, ""
        if self._state == "header":
            # What has no markers at all is an answer too, as text that a guide has demanded.
            return [Text(held)] if held.strip() and CHANNEL not in held else []
        events: list[ParsedDelta] = []
        self._tell(events, held.rstrip() if self._kind == "reasoning" else held)
        self._close(events)
        return events

    def _step(self, events: list[ParsedDelta]) -> bool:
        return self._header(events) if self._state == "header" else self._body(events)

    def _header(self, events: list[ParsedDelta]) -> bool:
        header, found, rest = self._buffer.partition(MESSAGE)
        if not found:
            return False
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        name = "final" if channel is None else channel[1]
        self._kind, self._fresh = "text", True
        if recipient is not None:
            # Built-in tools, which are not offered here, are the model's own business.
            function = recipient[1].removeprefix("functions.")
            called = self._takes_calls and recipient[1] != "assistant"
            self._kind = "call" if called else "reasoning"
            if called:
                events.append(Call(self.calls, function))
                self.calls += 1
                self._arguments = False
        elif name == "analysis":
            self._kind = "reasoning"
        if self._kind == "reasoning":
            self._tokens += self._undecided
        self._undecided = 0
        self._buffer, self._state = rest, "body"
        return True

    def _body(self, events: list[ParsedDelta]) -> bool:
        text = self._buffer
        found = first_of(_ENDS, text)
        settled = text[: found[0]] if found else text[: len(text) - unsettled(_ENDS, text)]
        if self._kind == "reasoning":
            settled = settled.rstrip()
        self._tell(events, settled)
        if found is None:
            self._buffer = text[len(settled) :]
            return False
        self._close(events)
        at, marker = found
        self._buffer, self._state = text[at + len(marker) :], "header"
        return True

    def _tell(self, events: list[ParsedDelta], text: str) -> None:
        if self._kind == "reasoning" and self._fresh:
            text = text.lstrip()
        if not text:
            return
        if self._kind == "call":
            self._arguments = True
            events.append(Arguments(self.calls - 1, text))
        elif self._kind == "reasoning":
            again = self._fresh and self._thought
            kind = Reasoning if self._split else Text
            events.append(kind(f"\n{text}" if again else text))
            self._thought = True
        else:
            # Messages to the user are paragraphs of one answer.
            events.append(Text(f"\n\n{text}" if self._fresh and self._spoken else text))
            self._spoken = True
        self._fresh = False

    def _close(self, events: list[ParsedDelta]) -> None:
        if self._kind == "call" and not self._arguments:
            events.append(Arguments(self.calls - 1, "{}"))
            self._arguments = True


def analysis_lead(tokens: MarkerTokens) -> str:
    """A grammar of the analysis which may come before ``@answer``."""
    return "\n".join([f"start: {_analysis(tokens)} @answer", _TEXT])


def final_lead(tokens: MarkerTokens) -> str:
    """A grammar of all that may come before an ``@answer`` in the final channel."""
    return "\n".join([f"start: {_analysis(tokens)} {_final(tokens)} @answer", _TEXT])


_TEXT = r"TEXT: /(.|\n)*/"


def _analysis(tokens: MarkerTokens) -> str:
    mark = tokens.terminal
    message = f'{mark(CHANNEL)} "analysis" {mark(MESSAGE)} TEXT {mark(END)}'
    return f'({message} {mark(START)} "assistant")*'


def _final(tokens: MarkerTokens) -> str:
    mark = tokens.terminal
    return f'{mark(CHANNEL)} "final" (" "? {mark(CONSTRAIN)} ("json" | "JSON"))? {mark(MESSAGE)}'


def call_rules(
    tools: Sequence[tuple[str, Mapping[str, Any]]],
    tokens: MarkerTokens,
    *,
    answer: str | None,
    required: bool,
) -> list[str]:
    """A grammar for one call, or an answer, behind the analysis.

    tools: names, and schemas of the parameters.
    answer: the rule of an answer that calls no tool; None for free text.
    required: whether a tool must be called.
    """
    mark = tokens.terminal
    rules, names = [], []
    for index, (name, schema) in enumerate(tools):
        # A call is addressed in the channel or before it: the model writes both.
        address = quoted(f" to=functions.{name}")
        kind = f'(" "? {mark(CONSTRAIN)})? "json"'
        names.append(f"call_{index}")
        rules += [
            f'call_{index}: ({mark(CHANNEL)} "commentary" {address} | {address} {mark(CHANNEL)} '
            f'"commentary") (" "? {kind})? {mark(MESSAGE)} arguments_{index}',
            f"arguments_{index}: %json {json.dumps(schema)}",
        ]
    calls = f"({' | '.join(names)})"
    said = (
        f'{mark(CHANNEL)} "commentary" {mark(MESSAGE)} TEXT {mark(END)} {mark(START)} "assistant"'
    )
    if required:
        start = calls
    elif answer is not None:
        start = f"{calls} | {_final(tokens)} {answer}"
    else:
        start = f"({said})? {calls} | {_final(tokens)} TEXT"
    return [f"start: {start}", *rules, *([] if required or answer is not None else [_TEXT])]
