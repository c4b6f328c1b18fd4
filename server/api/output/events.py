"""What the text of an answer consists of, as it arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Text:
    """Content of the message."""

    text: str


@dataclass(frozen=True)
class Call:
    """The beginning of a call. index: its number in the answer, from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the JSON text of the arguments of call number ``index``."""

    index: int
    text: str


ParsedDelta = Reasoning | Text | Call | Arguments


class OutputParser(Protocol):
    """Turns the text of one sequence into events.

    calls: how many calls have begun.
    reasoning_tokens: how many of the tokens were reasoning, its markers included.
    """

    @property
    def calls(self) -> int: ...

    @property
    def reasoning_tokens(self) -> int: ...

    def feed(self, text: str, tokens: int = 0) -> list[ParsedDelta]:
        """Add text, of so many tokens. Returns the events that are certain now."""
        ...

    def finish(self) -> list[ParsedDelta]:
        """The events of the text that was held back. Call it once, after the last ``feed``."""
        ...
