"""Finding markers in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken

from nybble.loaders.adapter_tokens import TextTokenizer


def first_of(markers: Iterable[str], text: str) -> tuple[int, str] | None:
    """Where the first marker in ``text`` begins, and which it is: of several the longest."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    if not found:
        return None
    at, _, marker = min(found)
    return at, marker


def unsettled(markers: Iterable[str], text: str) -> int:
    """Length of the longest end of ``text`` with which one of ``markers`` may begin."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest


def may_become(markers: Iterable[str], text: str) -> bool:
    """Whether more text may turn ``text`` into one of ``markers``."""
    return any(len(text) < len(marker) and marker.startswith(text) for marker in markers)


class MarkerTokens:
    """The markers which a vocabulary has as tokens of their own."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        added: dict[int, AddedToken] = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        # llguidance takes a token in angle brackets for a special one too.
        self._apart = self._special | {
            token.content: number
            for number, token in added.items()
            if token.content.startswith("<") and token.content.endswith(">")
        }

    def special(self, markers: Iterable[str]) -> frozenset[int]:
        """Those of ``markers`` which a text leaves out unless asked otherwise."""
        return frozenset(self._special[each] for each in markers if each in self._special)

    def is_token(self, marker: str) -> bool:
        """Whether a grammar's free text cannot have the marker, because it is a token."""
        return marker in self._apart

    def terminal(self, piece: str) -> str:
        """A marker or other text as a terminal of a grammar in Lark's syntax, as llguidance reads
        it. White space around a marker which is a token is text."""
        inner = piece.strip()
        if inner not in self._apart:
            return quoted(piece)
        before, _, after = piece.partition(inner)
        parts = [quoted(before), f"<[{self._apart[inner]}]>", quoted(after)]
        return " ".join(part for part in parts if part != '""')


def quoted(text: str) -> str:
    """A text as a terminal of a grammar."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'


def terminals(tokens: MarkerTokens, pieces: Sequence[str]) -> str:
    """Pieces one after another."""
    return " ".join(tokens.terminal(piece) for piece in pieces)
