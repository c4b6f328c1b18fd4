"""Checks training data when it is uploaded."""

from __future__ import annotations

from pathlib import Path

from nybble.finetune.rows import DataError, read_rows
from nybble.server.http.errors import ApiError


def count_examples(path: Path) -> tuple[int, int]:
    """Lines of training data, and those of them with messages.

    Raises ApiError 400 naming the first bad line.
    """
    examples = chats = 0
    try:
        for _, row in read_rows(path):
            examples += 1
            chats += isinstance(row.get("messages"), list)
    except DataError as error:
        where = "the file" if error.line is None else f"line {error.line}:"
        raise ApiError(400, f"{where} {error.reason}", param="file", code="invalid_file") from None
    if not examples:
        raise ApiError(400, "the file has no examples", param="file", code="invalid_file")
    return examples, chats
