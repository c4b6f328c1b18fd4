"""Finds tool calls in generated text as it arrives.

It reads two conventions:

- Hermes and Qwen wrap each call as ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``,
  anywhere in the text. Some models (Qwen2.5-Coder) leave the markers out if the whole answer
  consists of calls.
- The whole answer of Llama 3 is ``{"name": …, "parameters": {…}}``; several calls are separated by
  semicolons.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from pydantic_core import from_json

Convention = Literal["hermes", "llama3"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class Text:
    """Content of the message."""

    text: str


@dataclass(frozen=True)
class Call:
    """The beginning of a call. index: its number in the answer, from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the JSON text of the arguments of call number ``index``."""

    index: int
    text: str


ParsedDelta = Text | Call | Arguments


class ToolParser:
    """Turns the text of one sequence into events. What only looked like a call is text."""

    def __init__(self, convention: Convention, names: Collection[str]) -> None:
        self._hermes = convention == "hermes"
        self._names = names
        self._buffer = ""
        self._state: Literal["bare", "text", "call", "close", "plain"] = (
            "bare" if self._hermes else "text"
        )
        self._bare = _BareCalls(names)
        self._scanner = _CallScanner()
        self._begun = False  # whether an event for the current call has been returned
        self.calls = 0

    def feed(self, text: str) -> list[ParsedDelta]:
        """Add text. Returns the events that are certain now; the rest is held back."""
        self._buffer += text
        events: list[ParsedDelta] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[ParsedDelta]:
        """The events of the text that was held back. Call it once, after the last ``feed``."""
        if self._state == "bare":
            if calls := self._bare.whole():
                return [event for call in calls for event in self._told(*call)]
            self._end_bare()
            return [*self.feed(""), *self.finish()]
        held, self._buffer = self._buffer, ""
        if self._state == "call" and not self._begun:
            held = self._opening() + self._scanner.raw + held
        elif self._state in ("call", "close"):
            return []
        if self._hermes and self.calls and not held.strip():
            return []
        return [Text(held)] if held else []

    def _step(self, events: list[ParsedDelta]) -> bool:
        """Consume something from the buffer; False if more text is needed first."""
        if self._state == "bare":
            text, self._buffer = self._buffer, ""
            if self._bare.feed(text):
                return False
            self._end_bare()
            return True
        if self._state == "text":
            return self._find_hermes(events) if self._hermes else self._find_llama()
        if self._state == "call":
            return self._read_call(events)
        if self._state == "close":
            rest = self._buffer.lstrip()
            if rest.startswith(CLOSE):
                rest = rest[len(CLOSE) :]
            elif CLOSE.startswith(rest):
                return False
            self._buffer, self._state = rest, "text"
            return True
        if self._buffer:
            events.append(Text(self._buffer))
            self._buffer = ""
        return False

    def _end_bare(self) -> None:
        self._state, self._buffer = "text", self._bare.text

    def _told(self, name: str, arguments: str) -> list[ParsedDelta]:
        index = self.calls
        self.calls += 1
        return [Call(index, name), Arguments(index, arguments)]

    def _find_hermes(self, events: list[ParsedDelta]) -> bool:
        at = self._buffer.find(OPEN)
        if at >= 0:
            before, self._buffer = self._buffer[:at].rstrip(), self._buffer[at + len(OPEN) :]
            if before:
                events.append(Text(before))
            self._begin_call()
            return True
        # Hold back what may be the beginning of a marker, and white space, which is dropped if a
        # call follows.
        keep = max((n for n in range(1, len(OPEN)) if self._buffer.endswith(OPEN[:n])), default=0)
        settled = self._buffer[: len(self._buffer) - keep].rstrip()
        if settled:
            events.append(Text(settled))
            self._buffer = self._buffer[len(settled) :]
        return False

    def _find_llama(self) -> bool:
        rest = self._buffer.lstrip(" \n\t;," if self.calls else None)
        if not rest:
            return False
        if rest.startswith("{"):
            self._buffer = rest
            self._begin_call()
        else:
            self._state = "plain"
        return True

    def _begin_call(self) -> None:
        self._state, self._scanner, self._begun = "call", _CallScanner(), False

    def _opening(self) -> str:
        return OPEN if self._hermes else ""

    def _read_call(self, events: list[ParsedDelta]) -> bool:
        scanner = self._scanner
        self._buffer = self._buffer[scanner.feed(self._buffer) :]
        if not self._begun and scanner.name is not None and self._known(scanner.name):
            self._begun = True
            events.append(Call(self.calls, scanner.name))
            self.calls += 1
        if self._begun and (arguments := scanner.take_arguments()):
            events.append(Arguments(self.calls - 1, arguments))
        failed = scanner.failed or (not self._begun and (scanner.done or scanner.name is not None))
        if failed and not self._begun:
            events.append(Text(self._opening() + scanner.raw))
            self._state = "text" if self._hermes else "plain"
        elif scanner.done or failed:
            if not scanner.has_arguments:
                events.append(Arguments(self.calls - 1, "{}"))
            self._state = "close" if self._hermes else "text"
        else:
            return False
        return True

    def _known(self, name: str) -> bool:
        # A JSON answer of Llama 3 need not be a call. Between Hermes' markers it always is one: if
        # the tool does not exist, the client can tell the model so.
        return self._hermes or name in self._names


class _BareCalls:
    """An answer which may consist of calls without markers. Only its end shows whether it does."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._scanner: _CallScanner | None = None
        self._calls: list[tuple[str, str]] = []
        self.text = ""

    def feed(self, text: str) -> bool:
        """Add text. Returns whether all of the text so far can still be calls to known tools."""
        self.text += text
        while text := text if self._scanner else text.lstrip():
            if self._scanner is None:
                if text[0] != "{":
                    return False
                self._scanner = _CallScanner()
            scanner = self._scanner
            text = text[scanner.feed(text) :]
            if scanner.failed or scanner.has_more or scanner.name not in (None, *self._names):
                return False
            if scanner.done:
                arguments = scanner.take_arguments()
                if scanner.name is None or not arguments.startswith("{"):
                    return False
                self._calls.append((scanner.name, arguments))
                self._scanner = None
        return True

    def whole(self) -> list[tuple[str, str]]:
        """Name and arguments of each call if the answer ends here; none if a call is incomplete."""
        return self._calls if self._scanner is None else []


class _CallScanner:
    """Reads one JSON object: its ``name``, and the raw text of its arguments as it arrives."""

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self.done = False
        self.failed = False
        self.has_arguments = False
        self.has_more = False  # whether it has other keys than a name and arguments
        self._arguments = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._string = ""
        self._key = ""
        self._expect: Literal["key", "value"] = "key"
        self._capturing = False

    def feed(self, text: str) -> int:
        """Read on. Returns how many characters of ``text`` belong to the object."""
        for count, character in enumerate(text):
            if self.done or self.failed:
                return count
            self.raw += character
            self._take(character)
        return len(text)

    def take_arguments(self) -> str:
        """The text of the arguments since this method was last called."""
        taken, self._arguments = self._arguments, ""
        return taken

    def _take(self, character: str) -> None:
        if not self._depth:
            if character == "{":
                self._depth = 1
            elif not character.isspace():
                self.failed = True
            return
        if self._begins_arguments(character):
            self._capturing = self.has_arguments = True
        if self._capturing:
            self._capture(character)
        if self._in_string:
            self._string += character
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
                self._end_string()
        elif character == '"':
            self._in_string, self._string = True, '"'
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.done = not self._depth
        elif self._depth == 1 and character == ":":
            self._expect = "value"
        elif self._depth == 1 and character == ",":
            self._expect = "key"

    def _begins_arguments(self, character: str) -> bool:
        return (
            self._depth == 1
            and self._expect == "value"
            and self._key in _ARGUMENTS
            and not self.has_arguments
            and not character.isspace()
            and character != ":"
        )

    def _capture(self, character: str) -> None:
        outside = self._depth == 1 and not self._in_string
        if outside and character in ",}":  # these end a number, true, false or null
            self._capturing = False
            return
        self._arguments += character
        # An object or array ends with the bracket that brings the depth back to 1.
        if not self._in_string and self._depth == 2 and character in "}]":
            self._capturing = False

    def _end_string(self) -> None:
        if self._depth != 1:
            return
        try:
            value = from_json(
                self._string
            )  # refuses an unpaired surrogate, which UTF-8 cannot hold
        except ValueError:
            self.failed = True
            return
        if self._expect == "key":
            self._key = value
            self.has_more |= value not in ("name", *_ARGUMENTS)
        elif self._key == "name" and self.name is None:
            self.name = value
