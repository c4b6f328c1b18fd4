"""OpenAI's messages as chat templates expect them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json


def as_turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with plain text as its content, and the arguments of its tool calls as objects.

    Raises ValueError if the content is not text or the arguments are not JSON.
    """
    turn = {name: value for name, value in message.items() if value is not None}
    role = turn.get("role")
    if not isinstance(role, str):
        raise ValueError("a message needs a role: system, user, assistant or tool")
    if role == "developer":  # the newer name of the system's role
        turn["role"] = "system"
    content = turn.setdefault("content", "")
    if isinstance(content, list):
        turn["content"] = content = "\n".join(_text(part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is {content!r:.50}, expected text")
    if turn.get("tool_calls"):
        turn["tool_calls"] = [_call(at, call) for at, call in enumerate(turn["tool_calls"])]
    return turn


def _text(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise ValueError(f"a part of a message is {part!r:.50}, expected text")
    return text


def _call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        try:
            # The parser of request bodies: it refuses, for example, half a surrogate pair, which
            # cannot be encoded.
            arguments = from_json(arguments or "{}", allow_inf_nan=False)
        except ValueError:
            raise ValueError(
                f"the arguments of call {index} to {function['name']!r} are not JSON"
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}
