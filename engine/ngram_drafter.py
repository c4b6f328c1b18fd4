"""Drafts by prompt lookup: what followed the newest tokens when they last stood together.

Code that is rewritten, documents that are quoted and records that are filled in repeat long runs of
what a sequence has seen. No second model is needed, and any adapter may be in use.

Source: Saxena, "Prompt Lookup Decoding", 2023; the draft grows with the match as in Oliaro et al.,
"SuffixDecoding", 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_SHORTEST = 2  # tokens that must agree
_LONGEST = 32  # tokens that are compared
_CANDIDATES = 16  # places that are compared, the newest first
_SHIFT = 32  # bits of a token id in a key


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow a sequence.

    agreeing: how many tokens before them agree with those before the place where they were found.
    """

    tokens: tuple[int, ...]
    agreeing: int


class NgramDrafter:
    """Finds continuations in one sequence's own tokens.

    Memory and the time of :meth:`extend` are proportional to the tokens; :meth:`propose` takes
    bounded time.
    """

    def __init__(self, expected: Iterable[int] = ()) -> None:
        """expected: what the sequence may say or repeat, beside its own tokens."""
        self._tokens: list[int] = []
        # Where the newest occurrence of two tokens in a row ends, and for each end, the one before.
        self._newest: dict[int, int] = {}
        self._before: list[int] = []
        self.extend(expected)
        self._expected = len(self._tokens)

    def __len__(self) -> int:
        """The sequence's tokens that are known."""
        return len(self._tokens) - self._expected

    def extend(self, token_ids: Iterable[int]) -> None:
        """Add the tokens that follow those known."""
        tokens, newest, before = self._tokens, self._newest, self._before
        for token in token_ids:
            end = len(tokens) + 1
            tokens.append(token)
            if end == 1:
                before.append(0)
                continue
            key = tokens[-2] << _SHIFT | token
            before.append(newest.get(key, 0))
            newest[key] = end

    def propose(self, limit: int) -> Draft | None:
        """Up to ``limit`` tokens that may follow: no more than twice as many as agree before them.

        Of the newest places where the last tokens stood before, the one where most of them agree.
        """
        tokens = self._tokens
        best = length = 0
        end = self._before[-1] if self._before else 0
        for _ in range(_CANDIDATES):
            if not end:
                break
            agreeing = self._agreeing(end)
            if agreeing > length:
                best, length = end, agreeing
                if length == _LONGEST:
                    break
            end = self._before[end - 1]
        if length < _SHORTEST:
            return None
        count = min(limit, 2 * length)
        draft = tokens[best : best + count]
        while len(draft) < count:  # what repeats without a pause goes on repeating
            draft += draft[: count - len(draft)]
        return Draft(tuple(draft), length)

    def _agreeing(self, end: int) -> int:
        """How many tokens before ``end`` are those before the end of all."""
        tokens, last = self._tokens, len(self._tokens)
        most = min(_LONGEST, end)
        for count in range(_SHORTEST, most):
            if tokens[end - 1 - count] != tokens[last - 1 - count]:
                return count
        return most
