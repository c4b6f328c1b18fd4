"""Calls in Python's syntax, as Llama 4 and others write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nybble.engine.guide import JSON_OPTIONS
from nybble.server.api.output.call_values import python_json, types_of
from nybble.server.api.output.calls import NAME, SPACE, CallSyntax, Schemas
from nybble.server.api.output.markers import MarkerTokens, quoted


@dataclass(frozen=True)
class PythonCall(CallSyntax):
    """``name(city="Rome", days=3)``."""

    def reader(self, schemas: Schemas) -> PythonReader:
        return PythonReader(schemas)

    def begins(self, character: str) -> bool:
        return character in NAME

    def rules(
        self, rule: str, name: str, schema: Mapping[str, Any], tokens: MarkerTokens
    ) -> list[str]:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        rules: list[str] = []
        always: list[str] = []
        sometimes: list[str] = []
        for index, (key, of) in enumerate(properties.items()):
            part = f"{rule}_{index}"
            (always if key in required else sometimes).append(part)
            if types_of(of, definitions) == {"boolean"}:
                rules.append(f'{part}: {quoted(key + "=")} ("True" | "False")')
                continue
            whole = {**(of if isinstance(of, Mapping) else {}), **definitions}
            whole["x-guidance"] = JSON_OPTIONS
            rules.append(f"{part}: {quoted(key + '=')} {part}_json")
            rules.append(f"{part}_json: %json {json.dumps(whole)}")
        body = ' ", " '.join(always)
        if always:
            body += "".join(f' (", " {each})?' for each in sometimes)
        elif sometimes:
            # The first of those that are there has no comma before it.
            ways = [
                " ".join([first, *(f'(", " {each})?' for each in sometimes[at + 1 :])])
                for at, first in enumerate(sometimes)
            ]
            body = f"({' | '.join(ways)})?"
        return [f'{rule}: {quoted(name + "(")} {body} ")"', *rules]


class PythonReader:
    """Reads a call in Python's syntax. An argument is told once it is complete."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._head = ""
        self._argument = ""
        self._arguments = ""
        self._positional: list[str] = []
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self.name: str | None = None
        self.done = self.failed = self.has_arguments = False

    def feed(self, text: str) -> str:
        for count, character in enumerate(text):
            if self.done or self.failed:
                return text[count:]
            if self.name is None:
                self._read_name(character)
            else:
                self._read(character)
        return ""

    def take_arguments(self) -> str:
        taken, self._arguments = self._arguments, ""
        return taken

    def _read_name(self, character: str) -> None:
        if character == "(" and self._head.strip():
            self.name = self._head.strip()
            properties = self._schemas.get(self.name, {}).get("properties")
            self._positional = list(properties) if isinstance(properties, Mapping) else []
        elif character in NAME or (character in SPACE and not self._head.strip()):
            self._head += character
        else:
            self.failed = True

    def _read(self, character: str) -> None:
        if self._quote:
            self._argument += character
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == self._quote:
                self._quote = ""
            return
        if not self._depth and character in ",)":
            self._end_argument()
            if character == ")" and not self.failed:
                if self.has_arguments:
                    self._arguments += "}"
                self.done = True
            return
        self._argument += character
        if character in "\"'":
            self._quote = character
        elif character in "([{":
            self._depth += 1
        elif character in ")]}":
            self._depth -= 1

    def _end_argument(self) -> None:
        source, self._argument = self._argument.strip(), ""
        if not source:
            return
        found = re.match(r"([A-Za-z_][\w-]*)\s*=(?!=)", source)
        if found is not None:
            key, source = found[1], source[found.end() :].strip()
        elif self._positional:
            key = self._positional[0]
        else:
            self.failed = True
            if self.has_arguments:
                self._arguments += "}"
            return
        if key in self._positional:
            self._positional.remove(key)
        self._arguments += ("{" if not self.has_arguments else ", ") + json.dumps(key) + ": "
        self._arguments += python_json(source)
        self.has_arguments = True
