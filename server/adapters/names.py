"""The names that adapters may have, whoever gives them.

Names become parts of paths: of uploads, of the cache, and in shared places.
"""

from __future__ import annotations

import re

_PART = r"[A-Za-z0-9][A-Za-z0-9._:-]*"
# One slash, for the hub's org/name. No part can be ".." or a hidden file.
_NAME = re.compile(rf"(?=.{{1,200}}\Z){_PART}(/{_PART})?")
RULE = (
    "letters, digits, '.', '_', '-' and ':', a letter or digit first, at most 200 together; one "
    "slash may be between two such parts, as in org/name"
)
_SHOWN = 200  # of a wrong name in an error


def is_name(name: str) -> bool:
    """Whether an adapter may have this name."""
    return _NAME.fullmatch(name) is not None


def require_name(name: str) -> str:
    """The name itself. Raises ValueError naming the rule if no adapter may have it."""
    if not is_name(name):
        shown = repr(name[:_SHOWN]) + (" …" if len(name) > _SHOWN else "")
        raise ValueError(f"{shown} cannot be the name of an adapter: expected {RULE}")
    return name
