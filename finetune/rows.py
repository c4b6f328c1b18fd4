"""Lines of training data, as OpenAI's fine-tuning files have them, without any model's tokenizer.

A line is a JSON object: ``{"messages": […], "tools": […]}``, where an assistant's message may have
``"weight": 0`` to be read and not learned, ``{"prompt": …, "completion": …}``, or ``{"text": …}``.
Other members are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic_core import from_json

Kind = Literal["messages", "completion", "text"]

MAX_LINE_BYTES = 4 << 20
_ROLES = ("system", "developer", "user", "assistant", "tool")


class DataError(ValueError):
    """A data file cannot be used; the message names file and line, and what was expected.

    line: the first bad line, counted from 1; None if the whole file is at fault.
    reason: the message without file and line.
    """

    def __init__(self, path: Path, line: int | None, reason: str) -> None:
        super().__init__(f"{path} line {line}: {reason}" if line else f"{path} {reason}")
        self.line = line
        self.reason = reason


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row that is not blank, with its line number. Raises DataError at the first bad one."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(path, number, f"longer than {MAX_LINE_BYTES} bytes")
                if not line.strip():
                    continue
                try:
                    # Refuses deep nesting, and half a surrogate pair, which tokenizers cannot take.
                    row = from_json(line.decode("utf-8"), allow_inf_nan=False)
                except ValueError as error:
                    # A row is one line, and the message states its number already.
                    reason = str(error).replace(" at line 1 column ", " at column ")
                    raise DataError(path, number, f"not valid JSON: {reason}") from None
                try:
                    row_kind(row)
                except ValueError as error:
                    raise DataError(path, number, str(error)) from None
                yield number, row
    except OSError as error:
        raise DataError(path, None, f"cannot be read: {error}") from error


def row_kind(row: Any) -> Kind:
    """Validate a row and return which of the three kinds it is. Raises ValueError if none."""
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            _check_chat(row)
            return "messages"
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return "completion"
        if isinstance(row.get("text"), str):
            return "text"
    raise ValueError(
        "expected an object with 'messages', with 'prompt' and 'completion', or 'text'"
    )


def is_learned(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _check_chat(row: dict[str, Any]) -> None:
    for index, message in enumerate(row["messages"]):
        _check_message(index, message)
    if not any(map(is_learned, row["messages"])):
        raise ValueError("there is no assistant message to learn from")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is not a list of objects")


def _check_message(index: int, message: Any) -> None:
    if not isinstance(message, dict) or "role" not in message:
        raise ValueError(f"message {index} has no role and content")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in _ROLES:
        raise ValueError(f"message {index} has the role {role!r}, expected one of {_ROLES}")
    if content is None and not (role == "assistant" and calls):
        raise ValueError(f"message {index} has no role and content")
    if content is not None and not isinstance(content, str):
        parts = content if isinstance(content, list) else [None]
        for part in parts:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise ValueError(f"the content of message {index} is neither text nor text parts")
    if message.get("weight") not in (None, 0, 1):
        raise ValueError(f"the weight of message {index} is neither 0 nor 1")
    if calls is not None:
        _check_calls(index, calls)


def _check_calls(index: int, calls: Any) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"the tool_calls of message {index} are not a list of function calls")
        try:
            arguments = from_json(function.get("arguments") or "{}", allow_inf_nan=False)
        except (TypeError, ValueError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"the arguments of {function['name']!r} in message {index} are no JSON object"
            )
