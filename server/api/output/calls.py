"""How one tool call is written: a syntax reads it as it arrives, and writes its grammar.

Four kinds of syntax serve all families: an object of JSON, a name followed by arguments in JSON,
parameters between tags, and a call in Python's syntax.
"""

from __future__ import annotations

import ast
import json
import re
import string
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic_core import from_json

from nybble.engine.guide import JSON_OPTIONS
from nybble.server.api.output.markers import MarkerTokens, may_become, quoted, unsettled

# The white space which the library allows inside JSON.
WHITE_SPACE = f"WS: /{JSON_OPTIONS['whitespace_pattern']}/"

Schemas = Mapping[str, Mapping[str, Any]]
_SPACE = " \t\r\n"
_NAME = frozenset(string.ascii_letters + string.digits + "_.-")


class CallReader(Protocol):
    """Reads one call.

    name: of the tool, once it is known.
    done: whether the call is complete.
    failed: whether the text is no call.
    has_arguments: whether arguments have begun.
    """

    name: str | None
    done: bool
    failed: bool
    has_arguments: bool

    def feed(self, text: str) -> str:
        """Read on. Returns the end of ``text`` that does not belong to the call."""
        ...

    def take_arguments(self) -> str:
        """The JSON text of the arguments since this method was last called."""
        ...


class CallSyntax(ABC):
    """How a family writes one call."""

    @abstractmethod
    def reader(self, schemas: Schemas) -> CallReader:
        """A reader of one call. schemas: of the parameters, by the name of the tool."""

    @abstractmethod
    def begins(self, character: str) -> bool:
        """Whether a call may begin with this character."""

    @abstractmethod
    def rules(
        self, rule: str, name: str, schema: Mapping[str, Any], tokens: MarkerTokens
    ) -> list[str]:
        """A grammar's rule called ``rule`` for calls of one tool, and the rules it needs, whose
        names begin with it too. The grammar has :data:`WHITE_SPACE`."""


# --- an object of JSON ---


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


# --- a name, then arguments ---


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
        return character in _NAME

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
            if not head or any(each not in _NAME for each in head):
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


# --- parameters between tags ---


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
        return character in (self.name[0][:1] or _NAME)

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
        if _types(schema, definitions) & {"string", "any"}:
            # Free text, which ends with the first closing tag.
            if tokens.is_token(self.value[1].strip()):
                return [f"{rule}: {head} {rule.upper()} {end}", rf"{rule.upper()}: /(.|\n)*/"]
            return [f"{rule}: {head} {rule}_text", rf"{rule}_text[suffix={end}]: /(.|\n)*/"]
        whole = {**schema, **definitions, "x-guidance": JSON_OPTIONS}
        return [f"{rule}: {head} {rule}_json {end}", f"{rule}_json: %json {json.dumps(whole)}"]


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
        length = next((at for at, each in enumerate(text) if each not in _NAME), None)
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
        self._streams = _types(self._schema, self._definitions) == {"string"}
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
                self._arguments += _value_json(value, self._schema, self._definitions)
            self._state = "next"
            return True
        if self._streams:
            ends = (close, f"\n{close}") if self._spaced else (close,)
            settled = len(self._buffer) - unsettled(ends, self._buffer)
            self._arguments += _inner_json(self._buffer[:settled])
            self._buffer = self._buffer[settled:]
        return False


# --- Python ---


@dataclass(frozen=True)
class PythonCall(CallSyntax):
    """``name(city="Rome", days=3)``."""

    def reader(self, schemas: Schemas) -> PythonReader:
        return PythonReader(schemas)

    def begins(self, character: str) -> bool:
        return character in _NAME

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
            if _types(of, definitions) == {"boolean"}:
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
        elif character in _NAME or (character in _SPACE and not self._head.strip()):
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
        self._arguments += _python_json(source)
        self.has_arguments = True


def _python_json(source: str) -> str:
    """A literal of Python, or of JSON, as JSON. What is neither is a text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings that are none
            value = _literal(ast.parse(source, mode="eval").body)
        return _json(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return json.dumps(source)


_WORDS = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and not isinstance(node.value, bytes | complex):
        if node.value is ...:
            raise ValueError
        return node.value
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
        raise ValueError
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(each) for each in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_literal(key) for key in node.keys if key is not None]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_literal, node.values), strict=True))
    raise ValueError


# --- values ---


def _json(value: Any) -> str:
    """JSON of a value. Raises ValueError if it has none, as infinity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value, allow_nan=False)
    return text


def _inner_json(text: str) -> str:
    """A part of a text as it is written inside a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _types(schema: Any, definitions: Mapping[str, Any], depth: int = 8) -> set[str]:
    """The types a schema allows; ``any`` if it does not say."""
    if not isinstance(schema, Mapping) or not depth:
        return {"any"}
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {each for each in kind if isinstance(each, str)}
    if isinstance(values := schema.get("enum"), list):
        return {"string"} if all(isinstance(each, str) for each in values) else {"any"}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found: Any = definitions
        for part in reference[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return _types(found, definitions, depth - 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(ways := schema.get(key), list) and ways:
            return set[str]().union(*(_types(way, definitions, depth - 1) for way in ways))
    return {"any"}


def _texts(schema: Any) -> list[str] | None:
    """The texts a schema allows, if it names them."""
    if not isinstance(schema, Mapping):
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values and all(isinstance(each, str) for each in values):
        return values
    return None


_TYPES: Sequence[tuple[str, type | tuple[type, ...]]] = (
    ("boolean", bool),
    ("null", type(None)),
    ("integer", int),
    ("number", (int, float)),
    ("object", dict),
    ("array", list),
)


def _value_json(text: str, schema: Any, definitions: Mapping[str, Any]) -> str:
    """A parameter's text as JSON of a type which its schema allows."""
    types = _types(schema, definitions)
    if types == {"string"}:
        return _json(text)
    written = text.strip()
    try:
        value = from_json(written, allow_inf_nan=False)
        raw = written
    except ValueError:
        raw = _python_json(written)
        value = from_json(raw)
        if isinstance(value, str):
            return _json(text)
    if isinstance(value, str) and "string" not in types and "any" not in types:
        return raw
    allowed = "any" in types or any(
        isinstance(value, kind) and (name == "boolean" or not isinstance(value, bool))
        for name, kind in _TYPES
        if name in types
    )
    if allowed and not isinstance(value, str):
        return raw
    return _json(text)
