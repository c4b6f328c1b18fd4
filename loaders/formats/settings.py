"""A checkpoint's ``quantization_config``, read field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nybble.loaders.errors import CheckpointError, unreadable

T = TypeVar("T")
_WORDS = {"true": True, "false": False}


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(unreadable(path, f"cannot be read: {error}")) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not an object")
    return found


@dataclass(frozen=True)
class Settings(Mapping[str, Any]):
    """The quantization settings in a file.

    Unambiguous variants are accepted: ``"4"`` and ``4.0`` for 4, ``"true"`` and 1 for true. A null
    field is treated as left out. Every error names the file and the field.

    source: where the values come from, for error messages.
    """

    given: Mapping[str, Any]
    source: str

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)

    def refuse(self, name: str, expected: str) -> CheckpointError:
        """The error that field ``name`` is not what was expected."""
        return CheckpointError(
            f"{self.source}: {name} is {self.given.get(name)!r}, expected {expected}"
        )

    def first(self, *names: str) -> str:
        """The first of several names of one field that is set; the first name if none is."""
        return next((name for name in names if self.given.get(name) is not None), names[0])

    def integer(self, name: str, default: int) -> int:
        value = self.given.get(name)
        if value is None:
            return default
        try:
            number = float(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if isinstance(number, bool) or not isinstance(number, int | float) or number % 1 != 0:
            raise self.refuse(name, "an integer")
        return int(number)

    def flag(self, name: str, default: bool) -> bool:
        value = self.given.get(name)
        if value is None:
            return default
        if isinstance(value, str):
            value = _WORDS.get(value.strip().lower(), value)
        if value not in (True, False):
            raise self.refuse(name, "true or false")
        return bool(value)

    def choice(self, name: str, known: Sequence[T], default: T) -> T:
        """One of ``known``; strings in any case, integers in any unambiguous form."""
        value: Any = self.given.get(name)
        if value is None:
            return default
        if isinstance(known[0], str) and isinstance(value, str):
            value = value.lower()
        if isinstance(known[0], int):
            value = self.integer(name, 0)
        if value not in known:
            raise self.refuse(name, ", ".join(map(str, known)))
        found: T = value
        return found

    def names(self, name: str) -> list[str]:
        """A list of strings; empty if the field is left out."""
        value = self.given.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(name, "a list of strings")
        return list(value)

    def table(self, name: str) -> Mapping[str, Any]:
        """An object; empty if the field is left out."""
        value = self.given.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.refuse(name, "an object")
        return value

    def group_size(self, name: str, default: int = 128) -> int:
        """Inputs which share a scale; −1 for all of them."""
        size = self.integer(name, default)
        if size != -1 and not 1 <= size < 2**31:
            raise self.refuse(name, "-1 or above 0")
        return size
