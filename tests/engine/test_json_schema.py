"""Schemas as tools really have them: what a grammar holds a model to, and what it leaves to it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from nybble.engine.guide import grammar_schema
from nybble.engine.json_schema import Omission, Schema

NODE = {
    "$defs": {
        "Color": {"enum": ["red", "blue"]},
        "Node": {
            "type": "object",
            "properties": {
                "color": {"$ref": "#/$defs/Color"},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            },
            "required": ["color", "next"],
        },
    },
    "$ref": "#/$defs/Node",
}
CAT = {
    "type": "object",
    "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
    "required": ["kind"],
}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]}


def of(name: str, **schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {name: schema}, "required": [name]}


# schema, values that it allows, values that its grammar refuses, what the grammar leaves out.
CASES: list[tuple[Schema, list[Any], list[Any], list[str]]] = [
    # All of it is expressed.
    (NODE, [{"color": "red", "next": {"color": "blue", "next": None}}], [{"color": "x"}], []),
    (
        {"type": "object", "properties": {"tail": {"$ref": "#"}}, "additionalProperties": False},
        [{}, {"tail": {"tail": {}}}],
        [{"tail": 5}, {"tail": {"x": 1}}],
        [],
    ),
    (
        {
            "$id": "https://a.b/c",
            "$ref": "https://a.b/c#/definitions/x~1y",
            "definitions": {"x/y": CAT},
        },
        [{"kind": "cat"}],
        [{"kind": "dog"}],
        [],
    ),
    (
        {"$ref": "#spot", "$defs": {"A": {"$anchor": "spot", "type": "integer"}}},
        [5],
        ["x"],
        [],
    ),
    ({"oneOf": [CAT, DOG]}, [{"kind": "cat"}, {"kind": "dog"}], [{"kind": "fox"}], []),
    (
        {
            "oneOf": [{"$ref": "#/$defs/C"}, {"$ref": "#/$defs/D"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {"C": CAT, "D": DOG},
        },
        [{"kind": "cat"}],
        [{"kind": "fox"}],
        [],
    ),
    ({"oneOf": [{"type": "string"}, {"type": "null"}]}, ["x", None], [5], []),
    ({"type": "integer", "nullable": True}, [5, None], ["x"], []),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, [4], [3], []),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": False}, [3], [2], []),
    ({"type": "array", "items": [{"const": 1}, {"const": 2}]}, [[1, 2, "x"]], [[2]], []),
    (
        {"type": "array", "items": [{"const": 1}], "additionalItems": False},
        [[1]],
        [[1, 2]],
        [],
    ),
    ({"type": "string", "minLength": 2.0}, ["ab"], ["a"], []),
    ({"type": "array", "minItems": math.inf}, [[]], ["a"], ["#/minItems"]),
    ({"type": "integer", "maximum": math.inf}, [5], ["a"], ["#/maximum"]),
    ({"$schema": "./local.json", "type": "integer"}, [5], ["x"], []),
    (
        {
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": {"const": 1},
        },
        [{"a": 1}],
        [{"a": 2}],
        [],
    ),
    (
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
        [{"a": 1}],
        [{"b": 1}],
        [],
    ),
    (
        of("a", type="integer", title="A", examples=[1], default=1, **{"x-order": 1}),
        [{"a": 5}],
        [{}],
        [],
    ),
    # The rest of it is.
    (
        of("a", type="string", pattern="^(?=.*x).*$"),
        [{"a": "x"}],
        [{"a": 5}],
        ["#/properties/a/pattern"],
    ),
    (
        of("a", type="string", pattern=r"\bfox\b"),
        [{"a": "a fox"}],
        [{}],
        ["#/properties/a/pattern"],
    ),
    (
        of("a", type="string", pattern=r"(a)\1"),
        [{"a": "aa"}],
        [{"a": 5}],
        ["#/properties/a/pattern"],
    ),
    (of("a", type="string", format="binary"), [{"a": "x"}], [{"a": 5}], ["#/properties/a/format"]),
    (
        of("a", type="string", format="phone", pattern="^[0-9]+$"),
        [{"a": "12"}],
        [{"a": "x"}],
        ["#/properties/a/format"],
    ),
    (
        of("a", type="array", items={"type": "integer"}, uniqueItems=True),
        [{"a": [1, 2]}],
        [{"a": ["x"]}],
        ["#/properties/a/uniqueItems"],
    ),
    ({"type": "array", "contains": {"const": 1}}, [[1]], [{}], ["#/contains"]),
    ({"type": "string", "not": {"const": "x"}}, ["y"], [5], ["#/not"]),
    (
        {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {}},
        [{"a": 1, "b": 2}],
        [5],
        ["#/if"],
    ),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, [{"a": 1}], [5], ["#/propertyNames"]),
    (
        {**of("a"), "dependentRequired": {"a": ["b"]}},
        [{"a": 1, "b": 1}],
        [{}],
        ["#/dependentRequired"],
    ),
    (
        {"allOf": [CAT], "unevaluatedProperties": False},
        [{"kind": "cat"}],
        [{"kind": "dog"}],
        ["#/unevaluatedProperties"],
    ),
    (
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        [0.5],
        ["x"],
        ["#/oneOf"],
    ),
    (of("a", type="String"), [{"a": "x"}], [{"a": 5}], ["#/properties/a/type"]),
    (of("a", type="dict"), [{"a": {}}], [{"a": 5}], ["#/properties/a/type"]),
    (of("a", type="float"), [{"a": 0.5}], [{"a": "x"}], ["#/properties/a/type"]),
    (of("a", type="any"), [{"a": "x"}, {"a": 5}], [{}], ["#/properties/a/type"]),
    (of("a", type="file"), [{"a": "x"}, {"a": 5}], [{}], ["#/properties/a/type"]),
    (of("a", type=["string", "file"]), [{"a": "x"}, {"a": 5}], [{}], ["#/properties/a/type"]),
    (
        {"allOf": [{"type": "string"}, {"minLength": 2}, {"type": "integer"}]},
        ["ab"],
        [5, "a"],
        ["#/allOf"],
    ),
    (
        {"allOf": [{"$ref": "#/$defs/C"}, {"$ref": "#/$defs/D"}], "$defs": {"C": CAT, "D": DOG}},
        [{"kind": "cat"}],
        [{"kind": "dog"}],
        ["#/allOf"],
    ),
    (
        of("a", type="number", minimum=0, maximum=1.7976931348623157e308),
        [{"a": 0.5}],
        [{"a": -1}],
        ["#/properties/a/maximum"],
    ),
    (
        {"type": "object", "properties": {"a": "string", "b": {"const": 1, "required": True}}},
        [{"a": 5, "b": 1}],
        [{"b": 2}],
        ["#/properties/a", "#/properties/b/required"],
    ),
    (of("a", **{"$ref": "https://other.test/x.json"}), [{"a": 1}], [{}], ["#/properties/a/$ref"]),
    (
        {"$ref": "#/$defs/A", "$defs": {"A": of("b", type="string", pattern="(?!x)")}},
        [{"b": "y"}],
        [{"b": 5}],
        ["#/$defs/A/properties/b/pattern"],
    ),
    # A branch or a property that a value can do without may contradict itself.
    (
        {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 3}, {"type": "string"}]},
        ["x"],
        [4],
        [],
    ),
    (
        {
            "anyOf": [
                {"type": "integer", "minimum": 5, "maximum": 3},
                {"type": "string", "pattern": "(?!x)"},
            ]
        },
        ["x"],
        [4],
        ["#/anyOf/1/pattern"],
    ),
]


BYTES = LLTokenizer("byte")


def allows(schema: Schema, value: Any) -> bool:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(grammar_schema(schema, [])))
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    text = json.dumps(value).encode()
    return matcher.validate_tokens(list(text)) == len(text) and (
        matcher.consume_tokens(list(text)) and matcher.is_accepting()
    )


@pytest.mark.parametrize(("schema", "valid", "refused", "paths"), CASES)
def test_a_grammar_allows_what_the_schema_allows_and_enforces_what_it_can(
    schema: Schema, valid: list[Any], refused: list[Any], paths: list[str]
) -> None:
    omissions: list[Omission] = []
    grammar_schema(schema, omissions)
    assert [omission.path for omission in omissions] == paths
    for value in valid:
        assert allows(schema, value), value
    for value in refused:
        assert not allows(schema, value), value
    if paths:
        with pytest.raises(ValueError, match=f"^{paths[0].replace('$', '.')}: "):
            grammar_schema(schema)
    else:
        grammar_schema(schema)


INVERTED = {"type": "integer", "minimum": 5, "maximum": 3}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        (INVERTED, "#/maximum"),
        ({**INVERTED, "not": {}}, "#/maximum"),
        (of("a", **INVERTED), "#/properties/a/maximum"),
        ({"$ref": "#/$defs/A", "$defs": {"A": INVERTED}}, "#/$defs/A/maximum"),
        ({"type": "array", "minItems": 1, "items": INVERTED}, "#/items/maximum"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "#/maxLength"),
        ({"type": "string", "const": 1}, "#/const"),
        ({"enum": []}, "#/enum"),
        (False, "#"),
        # References without an end.
        ({"$ref": "#"}, "#"),
        ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, "#"),
        (of("a", **{"$ref": "#"}), "#"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "#"),
        (
            {
                "$ref": "#/$defs/A",
                "$defs": {"A": of("b", **{"$ref": "#/$defs/B"}), "B": of("a", **{"$ref": "#"})},
            },
            "#",
        ),
    ],
)
def test_a_schema_that_no_value_satisfies_is_refused_strict_or_not(
    schema: Schema, path: str
) -> None:
    for omissions in (None, []):
        with pytest.raises(ValueError, match=f"^{re.escape(path)}: nothing matches"):
            grammar_schema(schema, omissions)


def test_a_log_may_have_the_keyword_but_no_name_of_the_schema() -> None:
    omissions: list[Omission] = []
    grammar_schema({"properties": {"secret": "x", "other": {"not": {}}}}, omissions)
    assert [omission.keyword for omission in omissions] == ["properties", "not"]
