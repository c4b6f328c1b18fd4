"""FunctionGemma's syntax of a call: ``name{city:<escape>Rome<escape>,days:3}``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from nybble.engine.guide import JSON_OPTIONS
from nybble.server.api.output.calls import CallSyntax, Schemas
from nybble.server.api.output.markers import MarkerTokens, quoted

_NAME = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*")
_SCALAR = re.compile(r"[^,\[\]{}]*")
_SIMPLE = ("integer", "number", "boolean", "null")
_DEEPEST = 64


@dataclass(frozen=True)
class EscapedCall(CallSyntax):
    """Keys are bare words, and texts stand between two markers; the rest is as in JSON.

    escape: the marker before and after a text.
    """

    escape: str = "<escape>"

    def reader(self, schemas: Schemas) -> EscapedReader:
        return EscapedReader(self.escape)

    def begins(self, character: str) -> bool:
        return _NAME.match(character) is not None

    def rules(
        self, rule: str, name: str, schema: Mapping[str, Any], tokens: MarkerTokens
    ) -> list[str]:
        grammar = _Grammar(rule, self.escape, tokens)
        body = grammar.object(f"{rule}_o", schema)
        return [f"{rule}: {quoted(name)} {body}", *grammar.rules]


class _Grammar:
    """Writes the rules for the arguments of one call. Methods return what stands for a value."""

    def __init__(self, call: str, escape: str, tokens: MarkerTokens) -> None:
        """call: what the names of all rules begin with."""
        self._call = call
        self._mark = tokens.terminal(escape)
        self._apart = tokens.is_token(escape)
        self._has_any = False
        self.rules: list[str] = []

    def object(self, rule: str, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return '"{}"' if schema.get("additionalProperties") is False else self._any("object")
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        parts = []
        for index, key in enumerate(sorted(properties)):  # the model has seen sorted keys
            value = self._value(f"{rule}_{index}", properties[key])
            parts.append((f"({quoted(key + ':')} {value})", key in required))
        return f'"{{" {self._sequence(rule, parts)} "}}"'

    def _sequence(self, rule: str, parts: Sequence[tuple[str, bool]]) -> str:
        """Parts with commas between those that are there. A part has whether it is required."""
        first = more = '""'  # what follows if nothing is there yet, and if something is
        for index in range(len(parts) - 1, -1, -1):
            part, required = parts[index]
            begun, behind = f"{rule}_f{index}", f"{rule}_n{index}"
            without_first, without = ("", "") if required else (f" | {first}", f" | {more}")
            self.rules += [
                f"{begun}: {part} {more}{without_first}",
                f'{behind}: "," {part} {more}{without}',
            ]
            first, more = begun, behind
        return first

    def _value(self, rule: str, schema: Any) -> str:
        schema = schema if isinstance(schema, Mapping) else {}
        kind, texts = schema.get("type"), schema.get("enum")
        if isinstance(texts, list) and texts and all(isinstance(each, str) for each in texts):
            return f"{self._mark} ({' | '.join(map(quoted, texts))}) {self._mark}"
        if kind == "string":
            return self._any("text")
        if kind == "object":
            return self.object(f"{rule}_o", schema)
        if kind == "array":
            item = self._value(f"{rule}_i", schema.get("items"))
            return f'"[" ({item} ("," {item})*)? "]"'
        if kind in _SIMPLE:
            whole = {**schema, "x-guidance": JSON_OPTIONS}
            self.rules.append(f"{rule}_json: %json {json.dumps(whole)}")
            return f"{rule}_json"
        return self._any("value")

    def _any(self, kind: str) -> str:
        """The rule for any text, object or value."""
        name = f"{self._call}_any"
        if not self._has_any:
            self._has_any = True
            value, pair, free = f"{name}_value", f"{name}_pair", f"{self._call.upper()}_FREE"
            if self._apart:
                text = [f"{name}_text: {self._mark} {free} {self._mark}", rf"{free}: /(.|\n)*/"]
            else:
                # Free text ends with the first marker.
                rest = f"{name}_rest"
                text = [f"{name}_text: {self._mark} {rest}"]
                text.append(rf"{rest}[suffix={self._mark}]: /(.|\n)*/")
            self.rules += [
                *text,
                f'{pair}: /[A-Za-z0-9_.-]{{1,64}}/ ":" {value}',
                f'{name}_object: "{{" ({pair} ("," {pair})*)? "}}"',
                f'{value}: {name}_text | {name}_object | "[" ({value} ("," {value})*)? "]" '
                r'| "true" | "false" | "null" | /-?[0-9]{1,15}(\.[0-9]{1,15})?/',
            ]
        return f"{name}_{kind}"


class EscapedReader:
    """Reads a call up to its last brace. The arguments are told once they are complete."""

    def __init__(self, escape: str) -> None:
        self._escape = escape
        self._buffer = ""
        self._read = 0  # characters of the buffer that have been looked at
        self._depth = 0
        self._arguments = ""
        self.name: str | None = None
        self.done = self.failed = self.has_arguments = False

    def feed(self, text: str) -> str:
        self._buffer += text
        if self.name is None:
            self._read_name()
        while self.name is not None and not (self.done or self.failed) and self._step():
            pass
        if not (self.done or self.failed):
            return ""
        return self._buffer[self._read :]

    def take_arguments(self) -> str:
        taken, self._arguments = self._arguments, ""
        return taken

    def _read_name(self) -> None:
        found = _NAME.match(self._buffer)
        rest = self._buffer[found.end() :] if found else self._buffer
        if found and rest.startswith("{"):
            self.name, self._read = found[1], found.end()
        else:
            self.failed = bool(rest.strip())

    def _step(self) -> bool:
        """Read one character, or one text between markers; False if more is needed first."""
        rest = self._buffer[self._read :]
        if not rest or (len(rest) < len(self._escape) and self._escape.startswith(rest)):
            return False
        if rest.startswith(self._escape):
            end = rest.find(self._escape, len(self._escape))
            if end < 0:
                return False
            self._read += end + len(self._escape)
            return True
        self._read += 1
        if rest[0] in "{[":
            self._depth += 1
        elif rest[0] in "}]":
            self._depth -= 1
            if not self._depth:
                self._end()
        return True

    def _end(self) -> None:
        start = self._buffer.index("{")
        try:
            value, _ = _value_of(self._buffer[: self._read], start, self._escape, 0)
        except ValueError:
            value = {}
        self._arguments = json.dumps(value, ensure_ascii=False)
        self.has_arguments = self.done = True


def _value_of(text: str, at: int, escape: str, depth: int) -> tuple[Any, int]:
    """The value at a place of a text, and the place behind it. Raises ValueError."""
    if depth > _DEEPEST:
        raise ValueError("too deep")
    at += len(text[at:]) - len(text[at:].lstrip())
    if text.startswith(escape, at):
        end = text.index(escape, at + len(escape))
        return text[at + len(escape) : end], end + len(escape)
    if text[at : at + 1] not in ("{", "["):
        found = _SCALAR.match(text, at)
        assert found is not None  # it matches nothing too
        return _scalar(found[0].strip()), found.end()
    closing = {"{": "}", "[": "]"}[text[at]]
    pairs: dict[str, Any] = {}
    values: list[Any] = []
    at += 1
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        if text.startswith(closing, at):
            return (pairs if closing == "}" else values), at + 1
        if closing == "}":
            key = _NAME.match(text, at)
            if key is None or not text.startswith(":", key.end()):
                raise ValueError("expected a key")
            pairs[key[1]], at = _value_of(text, key.end() + 1, escape, depth + 1)
        else:
            before = at
            value, at = _value_of(text, at, escape, depth + 1)
            if at == before:
                raise ValueError("expected a value")
            values.append(value)


def _scalar(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    known = isinstance(value, bool | int | None) or (isinstance(value, float) and isfinite(value))
    return value if known else text
