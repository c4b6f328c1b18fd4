"""Names of arguments that a class does not have are refused with what to use instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

T = TypeVar("T")


def named_arguments(elsewhere: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """A decorator of a class whose users come from other libraries.

    elsewhere: names that these have, and what to use instead.

    The class then raises TypeError for a name that it does not have, which says what to use, or
    which name is the nearest.
    """

    def decorate(kind: type[T]) -> type[T]:
        plain = kind.__init__
        known = list(signature(plain).parameters)[1:]

        @wraps(plain)
        def checked(self: T, *arguments: Any, **named: Any) -> None:
            for name in named:
                if name not in known:
                    raise TypeError(f"{kind.__name__} has no {name!r}{_instead(name)}")
            plain(self, *arguments, **named)

        def _instead(name: str) -> str:
            if name in elsewhere:
                return f": {elsewhere[name]}"
            near = get_close_matches(name, known, 1)
            return f": did you mean {near[0]}?" if near else f". It has: {', '.join(known)}"

        kind.__init__ = checked  # type: ignore[assignment]
        return kind

    return decorate
