"""Calls whose parameters stand between tags, as Qwen3-Coder, GLM and others write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nybble.engine.guide import JSON_OPTIONS
from nybble.server.api.output.call_values import types_of, value_json
from nybble.server.api.output.calls import NAME, CallSyntax, Schemas
from nybble.server.api.output.markers import MarkerTokens, may_become, quoted, unsettled


@dataclass(frozen=True)
class TaggedCall(CallSyntax):
    """A name, and each parameter's key and value between tags. A value is text, and what it means
    depends on the parameter's schema.

    name: what is written before and after the name. The end may be white space.
    key: what is written before and after a key.
    value: what is written before and after a value.
    close: what ends the call.
    """

    name: tuple[str, str]
    key: tuple[str, str]
    value: tuple[str, str]
    close: str

    def reader(self, schemas: Schemas) -> TaggedReader:
        return TaggedReader(self, schemas)

    def begins(self, character: str) -> bool:
        return character in (self.name[0][:1] or NAME)

    def rules(
        self, rule: str, name: str, schema: Mapping[str, Any], tokens: MarkerTokens
    ) -> list[str]:
        rules, parts = [], []
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        required = schema.get("required")
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        for index, (key, of) in enumerate(properties.items()):
            part = f"{rule}_{index}"
            rules += self._parameter(part, key, of, definitions, tokens)
            parts.append(part if isinstance(required, list) and key in required else f"({part})?")
        if not properties and schema.get("additionalProperties") is not False:
            part = f"{rule}_any"
            rules += self._parameter(part, None, {}, {}, tokens)
            parts.append(f"({part})*")
        before = quoted(self.name[0] + name + self.name[1])
        body = " ".join([before, *parts, tokens.terminal(self.close)])
        return [f"{rule}: {body}", *rules]

    def _parameter(
        self,
        rule: str,
        key: str | None,
        schema: Any,
        definitions: Mapping[str, Any],
        tokens: MarkerTokens,
    ) -> list[str]:
        words = r"/[A-Za-z0-9_.-]{1,64}/" if key is None else quoted(key)
        first = [tokens.terminal(self.key[0]), words, tokens.terminal(self.key[1])]
        if self.value[0]:
            first.append(tokens.terminal(self.value[0]))
        head, end = " ".join(first), tokens.terminal(self.value[1])
        choices = _texts(schema)
        if choices is not None:
            value = " | ".join(map(quoted, choices))
            return [f"{rule}: {head} ({value}) {end}"]
        if types_of(schema, definitions) & {"string", "any"}:
            # Free text, which ends with the first closing tag.
            if tokens.is_token(self.value[1].strip()):
                return [f"{rule}: {head} {rule.upper()} {end}", rf"{rule.upper()}: /(.|\n)*/"]
            return [f"{rule}: {head} {rule}_text", rf"{rule}_text[suffix={end}]: /(.|\n)*/"]
        whole = {**schema, **definitions, "x-guidance": JSON_OPTIONS}
        return [
            f"{rule}: {head} {rule}_json {end}",
            f"{rule}_json: %json {json.dumps(whole)}",
        ]


class TaggedReader:
    """Reads tagged parameters. Texts are streamed, other values told once they are complete."""

    def __init__(self, syntax: TaggedCall, schemas: Schemas) -> None:
        self._syntax = syntax
        self._schemas = schemas
        self._buffer = ""
        self._arguments = ""
        self._state: Literal["name", "next", "key", "open", "value"] = "name"
        self._properties: Mapping[str, Any] = {}
        self._definitions: Mapping[str, Any] = {}
        self._schema: Any = {}
        self._streams = False  # whether the value is a text
        self._first = True  # whether nothing of the value has been told
        self.name: str | None = None
        self.done = self.failed = self.has_arguments = False

    def feed(self, text: str) -> str:
        self._buffer += text
        while not (self.done or self.failed) and self._step():
            pass
        if not (self.done or self.failed):
            return ""
        rest, self._buffer = self._buffer, ""
        return rest

    def take_arguments(self) -> str:
        taken, self._arguments = self._arguments, ""
        return taken

    def _step(self) -> bool:
        if self._state == "name":
            return self._read_name()
        if self._state == "next":
            return self._read_next()
        if self._state == "key":
            return self._read_key()
        if self._state == "open":
            return self._open_value()
        return self._read_value()

    def _read_name(self) -> bool:
        before, after = (each.strip() for each in self._syntax.name)
        text = self._buffer.lstrip()
        if before and not text.startswith(before):
            self.failed = bool(text) and not may_become((before,), text)
            return False
        text = text[len(before) :].lstrip()
        length = next((at for at, each in enumerate(text) if each not in NAME), None)
        if length is None:
            return False
        name, rest = text[:length], text[length:]
        if not name or (after and not rest.startswith(after)):
            self.failed = not name or not may_become((after,), rest)
            return False
        self.name, self._buffer, self._state = name, rest[len(after) :], "next"
        schema = self._schemas.get(name, {})
        properties = schema.get("properties")
        self._properties = properties if isinstance(properties, Mapping) else {}
        self._definitions = schema
        return True

    def _read_next(self) -> bool:
        text = self._buffer.lstrip()
        key, close = self._syntax.key[0].strip(), self._syntax.close.strip()
        if text.startswith(key):
            self._buffer, self._state = text[len(key) :], "key"
            return True
        if text.startswith(close):
            self._buffer = text[len(close) :]
            self._end()
            return False
        if text and not may_become((key, close), text):
            self.failed = True
            if self.has_arguments:
                self._arguments += "}"
        return False

    def _end(self) -> None:
        if self.has_arguments:
            self._arguments += "}"
        self.done = True

    def _read_key(self) -> bool:
        key, found, rest = self._buffer.partition(self._syntax.key[1].strip())
        if not found:
            return False
        key = key.strip()
        self._arguments += ("{" if not self.has_arguments else ", ") + json.dumps(key) + ": "
        self.has_arguments = True
        self._schema = self._properties.get(key, {})
        self._streams = types_of(self._schema, self._definitions) == {"string"}
        self._first = True
        self._buffer, self._state = rest, "open"
        return True

    def _open_value(self) -> bool:
        opening = self._syntax.value[0].strip()
        if opening:
            text = self._buffer.lstrip()
            if not text.startswith(opening):
                if text and not may_become((opening,), text):
                    self._arguments += "null}"
                    self.failed = True
                return False
            self._buffer = text[len(opening) :]
        elif self._spaced:
            if not self._buffer:
                return False
            self._buffer = self._buffer.removeprefix("\n")
        if self._streams:
            self._arguments += '"'
        self._state = "value"
        return True

    @property
    def _spaced(self) -> bool:
        """Whether a line break stands around every value."""
        return self._syntax.value[1].startswith("\n")

    def _read_value(self) -> bool:
        close = self._syntax.value[1].strip()
        at = self._buffer.find(close)
        if at >= 0:
            value, self._buffer = self._buffer[:at], self._buffer[at + len(close) :]
            if self._spaced:
                value = value.removesuffix("\n")
            if self._streams:
                self._arguments += _inner_json(value) + '"'
            else:
                self._arguments += value_json(value, self._schema, self._definitions)
            self._state = "next"
            return True
        if self._streams:
            ends = (close, f"\n{close}") if self._spaced else (close,)
            settled = len(self._buffer) - unsettled(ends, self._buffer)
            self._arguments += _inner_json(self._buffer[:settled])
            self._buffer = self._buffer[settled:]
        return False


def _inner_json(text: str) -> str:
    """A part of a text as it is written inside a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _texts(schema: Any) -> list[str] | None:
    """The texts a schema allows, if it names them."""
    if not isinstance(schema, Mapping):
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values and all(isinstance(each, str) for each in values):
        return values
    return None
