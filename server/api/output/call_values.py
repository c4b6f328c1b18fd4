"""The values of arguments: what a schema allows, and from a model's text to JSON."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json


def python_json(source: str) -> str:
    """A literal of Python, or of JSON, as JSON. What is neither is a text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings that are none
            value = _literal(ast.parse(source, mode="eval").body)
        return json_text(value)
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


def json_text(value: Any) -> str:
    """JSON of a value. Raises ValueError if it has none, as infinity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value, allow_nan=False)
    return text


def types_of(schema: Any, definitions: Mapping[str, Any], depth: int = 8) -> set[str]:
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
        return types_of(found, definitions, depth - 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(ways := schema.get(key), list) and ways:
            return set[str]().union(*(types_of(way, definitions, depth - 1) for way in ways))
    return {"any"}


_TYPES: Sequence[tuple[str, type | tuple[type, ...]]] = (
    ("boolean", bool),
    ("null", type(None)),
    ("integer", int),
    ("number", (int, float)),
    ("object", dict),
    ("array", list),
)


def value_json(text: str, schema: Any, definitions: Mapping[str, Any]) -> str:
    """A parameter's text as JSON of a type which its schema allows."""
    types = types_of(schema, definitions)
    if types == {"string"}:
        return json_text(text)
    written = text.strip()
    try:
        value = from_json(written, allow_inf_nan=False)
        raw = written
    except ValueError:
        raw = python_json(written)
        value = from_json(raw)
        if isinstance(value, str):
            return json_text(text)
    if isinstance(value, str) and "string" not in types and "any" not in types:
        return raw
    allowed = "any" in types or any(
        isinstance(value, kind) and (name == "boolean" or not isinstance(value, bool))
        for name, kind in _TYPES
        if name in types
    )
    if allowed and not isinstance(value, str):
        return raw
    return json_text(text)
