"""Calls whose arguments are JSON: in one object with the name, or behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from nybble.server.api.output.calls import NAME, CallSyntax, Schemas
from nybble.server.api.output.markers import MarkerTokens, quoted


@dataclass(frozen=True)
class JsonCall(CallSyntax):
    """``{"name": …, "arguments": {…}}``. Any of the usual names of the keys is read.

    key: of the name.
    arguments: the key of the arguments.
    id: the key of an id before the name, which has the number of the call.
    """

    key: str = "name"
    arguments: str = "arguments"
    id: str | None = None

    def reader(self, schemas: Schemas) -> JsonReader:
        return JsonReader()

    def begins(self, character: str) -> bool:
        return character == "{"

    def rules(
        self, rule: str, name: str, schema: Mapping[str, Any], tokens: MarkerTokens
    ) -> list[str]:
        def key(text: str) -> list[str]:
            return [quoted(f'"{text}"'), quoted(":")]

        parts = [quoted("{")]
        if self.id is not None:
            parts += [*key(self.id), r"/\"[0-9]{1,3}\"/", quoted(",")]
        parts += [*key(self.key), quoted(json.dumps(name)), quoted(",")]
        parts += [*key(self.arguments), f"{rule}_arguments", quoted("}")]
        return [f"{rule}: {' WS? '.join(parts)}", f"{rule}_arguments: %json {json.dumps(schema)}"]


_NAMES = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters")


class JsonReader:
    """Reads one JSON object: its ``name``, and the raw text of its arguments as it arrives.

    has_more: whether it has other keys than a name and arguments.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self.failed = False
        self.has_arguments = False
        self.has_more = False
        self._arguments = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._string = ""
        self._key = ""
        self._expect: Literal["key", "value"] = "key"
        self._capturing = False

    def feed(self, text: str) -> str:
        for count, character in enumerate(text):
            if self.done or self.failed:
                return text[count:]
            self._take(character)
        return ""

    def take_arguments(self) -> str:
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
            # It refuses an unpaired surrogate, which UTF-8 cannot hold.
            value = from_json(self._string)
        except ValueError:
            self.failed = True
            return
        if self._expect == "key":
            self._key = value
            self.has_more |= value not in ("name", *_ARGUMENTS)
        elif self._key in _NAMES and self.name is None:
            self.name = value


@dataclass(frozen=True)
class NamedCall(CallSyntax):
    """A name, something between, and arguments in JSON.

    between: pieces between name and arguments.
    prefix: what is written before the name.
    suffix: a pattern of what may be written after the name.
    """

    between: tuple[str, ...]
    prefix: str = ""
    suffix: str = ""

    def reader(self, schemas: Schemas) -> NamedReader:
        return NamedReader(self)

    def begins(self, character: str) -> bool:
        return character in NAME

    def rules(
        self, rule: str, name: str, schema: Mapping[str, Any], tokens: MarkerTokens
    ) -> list[str]:
        parts = [quoted(self.prefix + name)]
        if self.suffix:
            parts.append(f"/{self.suffix}/")
        parts += [*map(tokens.terminal, self.between), f"{rule}_arguments"]
        return [f"{rule}: {' '.join(parts)}", f"{rule}_arguments: %json {json.dumps(schema)}"]


class NamedReader:
    """Reads a name up to the opening brace of the arguments, and their raw text."""

    _LONGEST = 256  # characters before the arguments

    def __init__(self, syntax: NamedCall) -> None:
        self._syntax = syntax
        self._ends = [piece.strip() for piece in syntax.between if piece.strip()] or ["\n"]
        self._head = ""
        self._after = ""  # what has come between the name and the arguments
        self._arguments = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self.name: str | None = None
        self.done = self.failed = self.has_arguments = False

    def feed(self, text: str) -> str:
        for count, character in enumerate(text):
            if self.done or self.failed:
                return text[count:]
            if self.has_arguments:
                self._argument(character)
            elif self.name is None:
                self._named(character)
            elif character == "{":
                self.has_arguments = True
                self._argument(character)
            else:
                self._after += character
                self.failed = len(self._after) > self._LONGEST
        return ""

    def take_arguments(self) -> str:
        taken, self._arguments = self._arguments, ""
        return taken

    def _named(self, character: str) -> None:
        self._head += character
        # A name ends with what separates it from the arguments, or with an id between them.
        end = next((each for each in self._ends if each in self._head), None)
        if end is None and character == "{":
            end = "{"
        if end is not None:
            head = self._head[: self._head.index(end)].strip().removeprefix(self._syntax.prefix)
            if self._syntax.suffix:
                head = re.sub(rf"(?:{self._syntax.suffix})\Z", "", head)
            if not head or any(each not in NAME for each in head):
                self.failed = True
                return
            self.name = head
            if end == "{":
                self.has_arguments = True
                self._argument(character)
        else:
            self.failed = len(self._head) > self._LONGEST

    def _argument(self, character: str) -> None:
        self._arguments += character
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.done = not self._depth
