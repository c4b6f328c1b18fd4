"""How one tool call is written: a syntax reads it as it arrives, and writes its grammar.

Five kinds of syntax serve all families: an object of JSON and a name followed by arguments in JSON
(``json_calls.py``), parameters between tags (``tagged_calls.py``), a call in Python's syntax
(``python_calls.py``), and values whose texts stand between markers (``escaped_calls.py``).
"""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from nybble.engine.guide import JSON_OPTIONS
from nybble.server.api.output.markers import MarkerTokens

# The white space which the library allows inside JSON.
WHITE_SPACE = f"WS: /{JSON_OPTIONS['whitespace_pattern']}/"

Schemas = Mapping[str, Mapping[str, Any]]
SPACE = " \t\r\n"
NAME = frozenset(string.ascii_letters + string.digits + "_.-")


class CallReader(Protocol):
    """Reads one call.

    name: of the tool, once it is known.
    done: whether the call is complete.
    failed: whether the text is no call.
    has_arguments: whether arguments have begun.
    """

    name: str | None
    done: bool
    failed: bool
    has_arguments: bool

    def feed(self, text: str) -> str:
        """Read on. Returns the end of ``text`` that does not belong to the call."""
        ...

    def take_arguments(self) -> str:
        """The JSON text of the arguments since this method was last called."""
        ...


class CallSyntax(ABC):
    """How a family writes one call."""

    @abstractmethod
    def reader(self, schemas: Schemas) -> CallReader:
        """A reader of one call. schemas: of the parameters, by the name of the tool."""

    @abstractmethod
    def begins(self, character: str) -> bool:
        """Whether a call may begin with this character."""

    @abstractmethod
    def rules(
        self, rule: str, name: str, schema: Mapping[str, Any], tokens: MarkerTokens
    ) -> list[str]:
        """A grammar's rule called ``rule`` for calls of one tool, and the rules it needs, whose
        names begin with it too. The grammar has :data:`WHITE_SPACE`."""
