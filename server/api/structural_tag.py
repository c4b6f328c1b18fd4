"""Structural tags: free text in which certain beginnings must be followed by JSON of a schema.

Two forms are accepted, as in vLLM and SGLang: ``{"structures": [{"begin", "schema", "end"}],
"triggers": […]}``, and xgrammar's ``{"format": {"type": "triggered_tags", "triggers": […], "tags":
[{"begin", "content": {"type": "json_schema", "json_schema": …}, "end"}]}}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nybble.engine import StructuralTag

_MAX_TAGS = 128


def tags_of(tag: dict[str, Any]) -> list[StructuralTag]:
    """The tags in either form. Raises ValueError naming what is missing, wrong or unsupported."""
    chosen = tag.get("format")
    if chosen is None:
        rules, triggers = tag.get("structures"), tag.get("triggers")
    elif isinstance(chosen, dict) and chosen.get("type") == "triggered_tags":
        for name in ("at_least_one", "stop_after_first", "excludes"):
            if chosen.get(name):
                raise ValueError(f"{name} of a structural tag is not supported")
        rules, triggers = chosen.get("tags"), chosen.get("triggers")
    else:
        kind = chosen.get("type") if isinstance(chosen, dict) else chosen
        raise ValueError(
            f"a structural tag of format {kind!r} is not supported, expected 'triggered_tags'"
        )
    texts = isinstance(triggers, list) and all(isinstance(t, str) and t for t in triggers)
    if not texts or not isinstance(rules, list) or not 0 < len(rules) <= _MAX_TAGS:
        raise ValueError(
            f"a structural tag needs a list of triggers, which are texts, and 1 to {_MAX_TAGS} tags"
        )
    return [_tag(rule, triggers or []) for rule in rules]


def _tag(rule: Any, triggers: Sequence[str]) -> StructuralTag:
    if not isinstance(rule, dict) or not isinstance(rule.get("begin"), str):
        raise ValueError("a tag needs begin, a text")
    begin, end = rule["begin"], rule.get("end", "")
    if not isinstance(end, str):
        raise ValueError(f"the end of the tag {begin!r} is not a text")
    trigger = max((t for t in triggers if begin.startswith(t)), key=len, default=None)
    if trigger is None:
        raise ValueError(f"the tag {begin!r} begins with none of the triggers")
    content = rule.get("content")
    if content is None:
        schema = rule.get("schema", {"type": "object"})
    elif isinstance(content, dict) and content.get("type") == "json_schema":
        schema = content.get("json_schema")
    else:
        raise ValueError(f"the content of the tag {begin!r} is not of type json_schema")
    if not isinstance(schema, dict):
        raise ValueError(f"the schema of the tag {begin!r} is not an object")
    return StructuralTag(trigger, begin, schema, end)
