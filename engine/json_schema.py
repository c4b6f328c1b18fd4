"""Rewrites a JSON schema to the part of it that a grammar can enforce.

Schemas of real tools (Pydantic's, Zod's, OpenAPI's, handwritten ones) have keywords which no
context-free grammar can enforce, and words which are not JSON Schema at all. This module turns a
schema into one that the grammar library compiles and that allows every value the original allows.
A keyword is kept, rewritten to an equivalent one, or dropped. Dropping one can only allow more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any] | bool
# Returns why the grammar library cannot compile a schema; None if it can.
Check = Callable[[dict[str, Any]], str | None]

TYPES = ("string", "integer", "number", "boolean", "object", "array", "null")
# Common misspellings of types.
_SPELLINGS = {
    **{"str": "string", "text": "string", "int": "integer", "long": "integer"},
    **{"float": "number", "double": "number", "decimal": "number", "bool": "boolean"},
    **{"dict": "object", "map": "object", "list": "array", "tuple": "array", "none": "null"},
}
# Keywords that no grammar can enforce. if, then and else belong together and are reported as "if".
_INEXPRESSIBLE = (
    *("not", "if", "contains", "uniqueItems", "propertyNames", "dependentRequired"),
    *("dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
    *("$dynamicRef", "$recursiveRef"),
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# The order in which keywords are dropped if a schema cannot be compiled: those that say least about
# a value first.
_GIVEN_UP = (
    *("format", "pattern", "multipleOf", "patternProperties"),
    *("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum"),
    *("maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"),
    *("allOf", "anyOf", "enum", "const", "additionalProperties", "required"),
    *("prefixItems", "items", "properties", "$ref", "type"),
)
# How the library's errors begin for a schema that no value satisfies.
_CONTRADICTION = "Unsatisfiable schema: "
_KEYWORDS = frozenset((*_GIVEN_UP, *_INEXPRESSIBLE, "oneOf", "additionalItems"))


@dataclass(frozen=True)
class Omission:
    """A keyword that the grammar does not enforce, or reads in another way.

    path: a JSON pointer to the keyword, from ``#``.
    """

    path: str
    reason: str

    @property
    def keyword(self) -> str:
        """The keyword, without the names and indexes of the path."""
        names = [name for name in self.path.split("/") if name in _KEYWORDS]
        return names[-1] if names else "$schema"

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def expressible(schema: Schema, check: Check) -> tuple[dict[str, Any], list[Omission]]:
    """A schema that ``check`` accepts, and the keywords of ``schema`` which it does not enforce.

    Every reference in it is to ``#/$defs/…``. If no keyword can be kept, it allows any value.

    Schemas in ``allOf`` which exclude each other count as not expressible: merged schemas of real
    tools often do. Raises ValueError naming the path of any other contradiction because of which no
    value satisfies the schema, and if every value would have to contain itself.
    """
    if schema is False:
        raise ValueError("#: nothing matches it: it allows no value")
    reader = _Reader(schema)
    read = reader.read()
    if not _ends(read):
        raise ValueError("#: nothing matches it: its references lead to itself without end")
    if check(read.joined()) is not None:
        _Reducer(read, check, reader.omissions).reduce()
    # A part which several references name is read several times, so omissions repeat.
    return read.joined(), list(dict.fromkeys(reader.omissions))


@dataclass
class _Read:
    """A rewritten schema.

    root: the schema without its definitions.
    definitions: the targets of its references, by their names in ``$defs``.
    paths: for each part, by its ``id()``, a JSON pointer to where it comes from.
    """

    root: dict[str, Any] = field(default_factory=dict)
    definitions: dict[str, Any] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)

    def joined(self) -> dict[str, Any]:
        return {**self.root, "$defs": self.definitions} if self.definitions else self.root


class _Reader:
    """One pass over a schema: keeps, rewrites or drops each keyword according to its kind."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._read = _Read()
        self.omissions: list[Omission] = []
        self._by_id: dict[str, Any] = {}
        self._names: dict[int, str] = {}  # by the id() of a reference's target
        self._waiting: list[tuple[str, Any, str, Any]] = []
        self._index(schema)

    def read(self) -> _Read:
        root = self._node(self._schema, "#", self._schema)
        # The library does not accept a boolean.
        self._read.root = root if isinstance(root, dict) else self._kept({}, "#")
        while self._waiting:
            name, target, path, resource = self._waiting.pop()
            self._read.definitions[name] = self._node(target, path, resource)
        return self._read

    def _kept(self, node: dict[str, Any], path: str) -> dict[str, Any]:
        self._read.paths[id(node)] = path
        return node

    def _omit(self, path: str, reason: str) -> None:
        self.omissions.append(Omission(path, reason))

    def _node(self, schema: Any, path: str, resource: Any) -> Schema:
        """Rewrite one schema.

        path: a JSON pointer to it.
        resource: the schema in which references that begin with ``#`` are resolved.
        """
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            self._omit(path, "it is not a schema: expected an object or a boolean")
            return self._kept({}, path)
        if isinstance(schema.get("$id"), str):
            resource = schema
        node: dict[str, Any] = {}
        for key, value in schema.items():
            at = f"{path}/{_escaped(key)}"
            if key == "$ref":
                self._reference(node, value, at, resource)
            elif key == "type":
                self._type(node, value, at)
            elif key == "enum":
                self._take(node, key, value, at, isinstance(value, list))
            elif key == "const":
                node[key] = value
            elif key in ("pattern", "format"):
                self._take(node, key, value, at, isinstance(value, str))
            elif key in _COUNTS:
                whole = _is_number(value) and value >= 0 and value == int(value)
                self._take(node, key, int(value) if whole else value, at, whole)
            elif key in _BOUNDS:
                self._bound(node, key, schema, at)
            elif key == "required":
                names = isinstance(value, list) and all(isinstance(name, str) for name in value)
                self._take(node, key, value, at, names)
            elif key in ("properties", "patternProperties"):
                if isinstance(value, dict):
                    node[key] = {
                        name: self._node(each, f"{at}/{_escaped(name)}", resource)
                        for name, each in value.items()
                    }
                else:
                    self._omit(at, "expected an object of schemas")
            elif key == "additionalProperties":
                node[key] = self._node(value, at, resource)
            elif key in ("items", "prefixItems"):
                self._items(node, key, schema, at, resource)
            elif key in ("anyOf", "allOf", "oneOf"):
                self._branches(node, key, schema, at, resource)
            elif key in _INEXPRESSIBLE:
                self._inexpressible(node, key, schema, at)
        # OpenAPI 3.0 allows null in this way, which the library does not know.
        if schema.get("nullable") is True and node:
            return self._kept({"anyOf": [self._kept(node, path), {"type": "null"}]}, path)
        return self._kept(node, path)

    def _take(self, node: dict[str, Any], key: str, value: Any, path: str, good: bool) -> None:
        if good:
            node[key] = value
        else:
            self._omit(path, f"{_shown(value)} is not a valid value of {key}")

    def _type(self, node: dict[str, Any], value: Any, path: str) -> None:
        names = value if isinstance(value, list) else [value]
        types: list[str] = []
        for name in names:
            spelled = name.lower() if isinstance(name, str) else ""
            found = spelled if spelled in TYPES else _SPELLINGS.get(spelled)
            if found is None:
                self._omit(path, f"{_shown(name)} is not a type of JSON Schema")
                return
            if found != name:
                self._omit(path, f"{_shown(name)} is not a type of JSON Schema, read as {found!r}")
            types.append(found)
        self._take(node, "type", types if isinstance(value, list) else types[0], path, bool(types))

    def _bound(self, node: dict[str, Any], key: str, schema: dict[str, Any], path: str) -> None:
        value = schema[key]
        if isinstance(value, bool) and key.startswith("exclusive"):
            return  # draft 4: a flag, which is read together with the bound it applies to
        exclusive = f"exclusive{key.capitalize()}"
        name = exclusive if schema.get(exclusive) is True else key
        good = _is_number(value) and (key != "multipleOf" or value > 0)
        self._take(node, name, value, path, good)

    def _items(
        self, node: dict[str, Any], key: str, schema: dict[str, Any], path: str, resource: Any
    ) -> None:
        value = schema[key]
        if not isinstance(value, list):
            if key == "items":
                node[key] = self._node(value, path, resource)
            else:
                self._omit(path, "expected a list of schemas")
            return
        # Before draft 2020-12 a list in `items` meant what `prefixItems` means now.
        node["prefixItems"] = [
            self._node(each, f"{path}/{index}", resource) for index, each in enumerate(value)
        ]
        if key == "items" and "additionalItems" in schema:
            parent = path.rpartition("/")[0]
            node["items"] = self._node(
                schema["additionalItems"], f"{parent}/additionalItems", resource
            )

    def _branches(
        self, node: dict[str, Any], key: str, schema: dict[str, Any], path: str, resource: Any
    ) -> None:
        value = schema[key]
        if not isinstance(value, list) or not value:
            self._omit(path, "expected a list of at least one schema")
            return
        if key == "oneOf" and not self._exclusive(schema, resource):
            self._omit(path, "a value may satisfy more than one of its schemas")
        branches = [
            self._node(each, f"{path}/{index}", resource) for index, each in enumerate(value)
        ]
        if key == "allOf":
            node["allOf"] = [*node.get("allOf", ()), *branches]
        elif "anyOf" in node:
            other = self._kept({"anyOf": branches}, path)
            node["allOf"] = [*node.get("allOf", ()), other]
        else:
            node["anyOf"] = branches

    def _inexpressible(
        self, node: dict[str, Any], key: str, schema: dict[str, Any], path: str
    ) -> None:
        value = schema[key]
        if key == "unevaluatedProperties" and value is False:
            applied = ("$ref", "allOf", "anyOf", "oneOf", "if", "additionalProperties")
            if not any(other in schema for other in (*applied, "dependentSchemas")):
                node["additionalProperties"] = False  # equivalent if no other schema applies here
                return
        # Whether the keyword has no effect here, so that nothing is lost by dropping it. Names are
        # always strings, and an `if` has no effect without then or else.
        nothing = {
            "not": value is False,
            "if": not ("then" in schema or "else" in schema),
            "contains": schema.get("minContains") == 0 and "maxContains" not in schema,
            "uniqueItems": value is False,
            "propertyNames": value in (True, {}, {"type": "string"}),
        }
        if not nothing.get(key, value is True or value == {}):
            self._omit(path, f"{key} is not supported")

    def _reference(self, node: dict[str, Any], value: Any, path: str, resource: Any) -> None:
        found = self._find(value, resource) if isinstance(value, str) else None
        if found is None:
            self._omit(path, f"{_shown(value)} is not in the schema")
            return
        target, at, of = found
        if (name := self._names.get(id(target))) is None:
            name = self._names[id(target)] = f"d{len(self._names)}"
            self._waiting.append((name, target, at, of))
        node["$ref"] = f"#/$defs/{name}"

    def _find(self, reference: str, resource: Any) -> tuple[Any, str, Any] | None:
        """A reference's target, the path of it, and the resource it is part of; None if missing."""
        address, _, fragment = reference.partition("#")
        fragment = unquote(fragment)
        if address:
            if address not in self._by_id:
                return None
            resource = self._by_id[address]
        if fragment and not fragment.startswith("/"):
            target = self._by_id.get("#" + fragment)
            return None if target is None else (target, "#" + fragment, resource)
        target = resource
        for part in fragment.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and name.isdigit() and int(name) < len(target):
                target = target[int(name)]
            elif isinstance(target, dict) and name in target:
                target = target[name]
            else:
                return None
        return target, "#" + fragment, resource

    def _index(self, schema: Any) -> None:
        """Collect the parts that have a name of their own ($id or $anchor)."""
        waiting = [schema]
        while waiting:
            part = waiting.pop()
            if isinstance(part, list):
                waiting += part
            elif isinstance(part, dict):
                waiting += part.values()
                for key, before in (("$id", ""), ("id", ""), ("$anchor", "#")):
                    if isinstance(name := part.get(key), str):
                        self._by_id.setdefault(before + name.removesuffix("#"), part)

    def _exclusive(self, schema: dict[str, Any], resource: Any) -> bool:
        """Whether the types and tags of ``oneOf``'s branches show that no value satisfies two."""
        discriminator = schema.get("discriminator")
        tag = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        kinds = [self._kind(branch, resource, tag) for branch in schema["oneOf"]]
        return all(
            _apart(first, second) for index, first in enumerate(kinds) for second in kinds[:index]
        )

    def _kind(self, schema: Any, resource: Any, tag: Any) -> _Kind:
        seen = 0
        while isinstance(schema, dict) and isinstance(schema.get("$ref"), str) and seen < 16:
            found = self._find(schema["$ref"], resource)
            if found is None:
                break
            schema, _, resource = found
            seen += 1
        if not isinstance(schema, dict):
            return _Kind(set(TYPES), None, {})
        named = schema.get("type", TYPES)
        types = (
            {named} if isinstance(named, str) else set(TYPES).intersection(map(str, named or ()))
        )
        if "number" in types:
            types.add("integer")
        tags: dict[str, set[str]] = {}
        properties = schema.get("properties")
        required = schema.get("required")
        for name in [*(required if isinstance(required, list) else ()), tag]:
            if isinstance(properties, dict) and isinstance(name, str) and types == {"object"}:
                allowed = _allowed(properties.get(name))
                if allowed is not None:
                    tags[name] = allowed
        return _Kind(types, _allowed(schema), tags)


@dataclass
class _Kind:
    """What tells a schema's values from those of another.

    types: the types it allows.
    values: the values it lists, as JSON; None if it lists none.
    tags: the values listed for each property that it requires, by the property's name.
    """

    types: set[str]
    values: set[str] | None
    tags: dict[str, set[str]]


def _apart(first: _Kind, second: _Kind) -> bool:
    if first.types.isdisjoint(second.types):
        return True
    if first.values is not None and second.values is not None:
        return first.values.isdisjoint(second.values)
    return any(
        first.tags[name].isdisjoint(second.tags[name]) for name in first.tags.keys() & second.tags
    )


def _allowed(schema: Any) -> set[str] | None:
    if isinstance(schema, dict):
        if "const" in schema:
            return {json.dumps(schema["const"], sort_keys=True)}
        if isinstance(schema.get("enum"), list):
            return {json.dumps(value, sort_keys=True) for value in schema["enum"]}
    return None


def _ends(read: _Read) -> bool:
    """Whether a value that satisfies the references of a schema can be finite.

    The definitions of which this is known grow until there is no other.
    """
    known: set[str] = set()
    # A definition is read after the one that refers to it: backwards, few passes are needed.
    left = list(reversed(read.definitions))
    while True:
        before = len(left)
        for name in left:
            if _ends_if(read.definitions[name], known):
                known.add(name)
        left = [name for name in left if name not in known]
        if len(left) == before:
            return _ends_if(read.root, known)


def _ends_if(node: Any, known: set[str]) -> bool:
    """Whether a value of ``node`` can be finite if values of the ``known`` definitions can."""
    if not isinstance(node, dict):
        return True  # whether false contradicts the rest is for the library to say
    needed: list[Any] = list(node.get("allOf", ()))
    if node.get("type") == "object":
        properties = node.get("properties", {})
        needed += [properties.get(name) for name in node.get("required", ())]
    if node.get("type") == "array":
        first = node.get("prefixItems", [])
        needed += first[: node.get("minItems", 0)]
        if node.get("minItems", 0) > len(first):
            needed.append(node.get("items"))
    reference = node.get("$ref")
    return (
        (reference is None or reference.removeprefix("#/$defs/") in known)
        and all(_ends_if(each, known) for each in needed)
        and ("anyOf" not in node or any(_ends_if(each, known) for each in node["anyOf"]))
    )


class _Reducer:
    """Drops keywords of a schema until the library compiles it."""

    def __init__(self, read: _Read, check: Check, omissions: list[Omission]) -> None:
        self._read = read
        self._check = check
        self._omissions = omissions
        self._contradictions: list[Omission] = []

    def reduce(self) -> None:
        definitions = self._read.definitions
        # First each part alone, so that a part does not lose keywords because of another which it
        # refers to. Then all together, for what cannot be compiled only in combination.
        for known in (dict.fromkeys(definitions, True), definitions):
            for part in [*definitions.values(), self._read.root]:
                self._settle(part, known)
            if (wrong := self._check(self._read.joined())) is None:
                return
        if self._contradictions:
            first = self._contradictions[0]
            raise ValueError(f"{first.path}: nothing matches the schema: {first.reason}")
        self._omissions.append(Omission("#", wrong or ""))
        self._read.root.clear()
        definitions.clear()

    def _wrong(self, node: dict[str, Any], known: dict[str, Any]) -> str | None:
        return self._check({**node, "$defs": known} if known else node)

    def _settle(self, node: Any, known: dict[str, Any]) -> None:
        if not isinstance(node, dict) or self._wrong(node, known) is None:
            return
        for child in _children(node):
            self._settle(child, known)
        wrong = self._wrong(node, known)
        if wrong is None:
            return
        dropped: list[tuple[str, Any]] = []
        for key in _GIVEN_UP:
            # Of schemas in allOf that contradict each other, the last is dropped first.
            while key in node and wrong is not None:
                dropped.append((key, _without(node, key)))
                wrong = self._wrong(node, known)
        reasons: dict[str, str] = {}
        contradicting: dict[str, Any] = {}
        path = self._read.paths.get(id(node), "#")
        for key, value in reversed(dropped):
            _put_back(node, key, value)
            if (now := self._wrong(node, known)) is not None:
                _without(node, key)
                if now.startswith(_CONTRADICTION) and key != "allOf":
                    contradicting[key] = value
                    reason = now.removeprefix(_CONTRADICTION)
                    self._contradictions.append(Omission(f"{path}/{key}", reason))
                else:
                    reasons[key] = now
        self._omissions += [Omission(f"{path}/{key}", why) for key, why in reasons.items()]
        # A contradiction stays: it may be in a branch or a property that a value can do without.
        node.update(contradicting)


def _without(node: dict[str, Any], key: str) -> Any:
    """Remove a keyword and return its value; of allOf only the last schema."""
    if key == "allOf" and len(node[key]) > 1:
        *node[key], last = node[key]
        return [last]
    return node.pop(key)


def _put_back(node: dict[str, Any], key: str, value: Any) -> None:
    node[key] = [*node.get(key, ()), *value] if key == "allOf" else value


def _children(node: dict[str, Any]) -> Iterator[Any]:
    for key in ("properties", "patternProperties"):
        yield from node.get(key, {}).values()
    for key in ("anyOf", "allOf", "prefixItems"):
        yield from node.get(key, ())
    for key in ("additionalProperties", "items"):
        if key in node:
            yield node[key]


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)  # JSON has 1e400
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
