"""Drafts by prompt lookup: what followed the newest tokens when they last stood together.

Code that is rewritten, documents that are quoted and records that are filled in repeat long runs of
what a sequence has seen. No second model is needed, and any adapter may be in use.

Source: Saxena, "Prompt Lookup Decoding", 2023; the draft grows with the match as in Oliaro et al.,
"SuffixDecoding", 2024.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.engine.drafter import Draft, Worth

if TYPE_CHECKING:
    from nybble.engine.inputs import StepItem
    from nybble.engine.sequence import Sequence

_SHORTEST = 2  # tokens that must agree
_LONGEST = 32  # tokens that are compared
_CANDIDATES = 16  # places that are compared, the newest first
_SHIFT = 32  # bits of a token id in a key
# Tokens of the prompt's end by which a predicted output is found.
_PREDICTION_CONTEXT = 4

# A token's grade is by how many tokens agree before it, those of its draft included.
_AGREEING = (2, 3, 4, 6, 8, 12, 16, 24)
_FIRST_GUESS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.8, 0.9)


@dataclass(frozen=True)
class Match:
    """Tokens that followed where the newest tokens stood before.

    agreeing: how many tokens before them agree with those before the place where they were found.
    """

    tokens: tuple[int, ...]
    agreeing: int

    def draft(self) -> Draft:
        places = range(self.agreeing, self.agreeing + len(self.tokens))
        return Draft(self.tokens, tuple(bisect_right(_AGREEING, place) - 1 for place in places))


class NgramDrafter:
    """Drafts by prompt lookup; see :class:`nybble.engine.drafter.Drafter`."""

    method = "ngram"
    first_guess = _FIRST_GUESS
    costs = None

    def __init__(self) -> None:
        self._known: dict[Sequence, Ngrams] = {}

    def draft(self, limits: Mapping[Sequence, int], worth: Worth) -> dict[Sequence, Draft]:
        drafts = {}
        for sequence, limit in limits.items():
            ngrams = self._known.get(sequence)
            if ngrams is None:
                ngrams = self._known[sequence] = Ngrams(_expected(sequence))
            ngrams.extend(sequence.token_ids[len(ngrams) :])
            if (match := ngrams.find(limit)) is not None:
                drafts[sequence] = match.draft()
        return drafts

    def reading(self, sequence: Sequence) -> float:
        return 0.0

    def see(self, batch: Iterable[StepItem]) -> None: ...

    def release(self, sequence: Sequence) -> None:
        self._known.pop(sequence, None)


def _expected(sequence: Sequence) -> tuple[int, ...]:
    """What a request says that its output probably is, found where its prompt ends, too."""
    prompt, expected = sequence.request.prompt_token_ids, sequence.request.prediction
    return (*prompt[-_PREDICTION_CONTEXT:], *expected) if expected else ()


class Ngrams:
    """Finds continuations in one sequence's own tokens.

    Memory and the time of :meth:`extend` are proportional to the tokens; :meth:`find` takes
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

    def find(self, limit: int) -> Match | None:
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
        return Match(tuple(draft), length)

    def _agreeing(self, end: int) -> int:
        """How many tokens before ``end`` are those before the end of all."""
        tokens, last = self._tokens, len(self._tokens)
        most = min(_LONGEST, end)
        for count in range(_SHORTEST, most):
            if tokens[end - 1 - count] != tokens[last - 1 - count]:
                return count
        return most
