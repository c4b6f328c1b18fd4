"""Regular expressions of files that people download: a match ends in time, or is an error."""

from __future__ import annotations

from typing import Literal

import regex

from nybble.loaders.errors import CheckpointError

_SECONDS = 1.0


def match(
    pattern: str | regex.Pattern[str],
    module: str,
    how: Literal["match", "fullmatch", "search"] = "match",
    error: type[CheckpointError] = CheckpointError,
) -> regex.Match[str] | None:
    """As the function of ``re`` with this name. Raises ``error`` if it takes too long."""
    compiled = regex.compile(pattern) if isinstance(pattern, str) else pattern
    try:
        found: regex.Match[str] | None = getattr(compiled, how)(module, timeout=_SECONDS)
    except TimeoutError:
        raise error(
            f"the pattern {compiled.pattern!r} takes over {_SECONDS} s to match {module}: "
            "simplify it"
        ) from None
    return found
