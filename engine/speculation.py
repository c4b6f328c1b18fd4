"""How many draft tokens a step verifies, decided by what steps cost and what drafts have earned.

A draft token is accepted if it is what the sequence's own sampling chooses at its place, with the
random number, penalties and grammar of that place. So drafts change nothing but the speed: for a
draft that is certain of its tokens, that is rejection sampling.

A step over several rows takes longer than one over few, and a draft token that is rejected was
computed in vain. Both are measured while the engine runs: the seconds of a step by its rows, and
how often draft tokens are right, by how many tokens agree before them. A step verifies as many
draft tokens as make the most tokens a second, which may be none: under load a row costs more than
it earns. A draft that is not verified teaches as well: its first token is compared with the one
that was sampled.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from nybble.engine.ngram_drafter import Draft
from nybble.engine.request import NoTokenError
from nybble.engine.sampler import Sampled

# Weights of the newest measurement: of its own number of rows, and of all steps, whose contexts
# grow together.
_OWN, _COMMON = 0.3, 0.1
# A longer step than expected by this factor was held up by something else.
_OUTLIER = 4.0
# A step with drafts must promise so much more than one without: the most promising of several
# estimates is too high on average.
_MARGIN = 1.03

# How many tokens agree before a draft token, and what is taken for its chance until it is known,
# with the weight of so many observations. An observation's weight falls with each later one.
_AGREEING = (2, 3, 4, 6, 8, 12, 16, 24)
_FIRST_GUESS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.8, 0.9)
_GUESS_WEIGHT, _KEPT = 8.0, 0.98
# A sequence's own chances differ from those of all by what it got over what was to be expected;
# both begin with so many tokens.
_CAUTION, _OWN_KEPT, _HIGHEST = 1.0, 0.95, 0.98


class StepCosts:
    """Seconds of a step by its rows, from the steps that were measured."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._seconds: list[float] = []

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        at = bisect_left(self._rows, rows)
        if at == len(self._rows) or self._rows[at] != rows:
            self._rows.insert(at, rows)
            self._seconds.insert(at, seconds)
            return
        ratio = min(seconds / self._seconds[at], _OUTLIER)
        common = 1 + _COMMON * (ratio - 1)
        self._seconds = [each * common for each in self._seconds]
        self._seconds[at] *= (1 + _OWN * (ratio - 1)) / common

    def of(self, rows: int) -> float | None:
        """Seconds that a step of so many rows is expected to take; None if nothing is known.

        Between measurements it is interpolated; beyond them it is the nearest, so that what has
        never been tried is tried.
        """
        if not self._rows:
            return None
        at = bisect_left(self._rows, rows)
        if at == len(self._rows):
            return self._seconds[-1]
        if at == 0 or self._rows[at] == rows:
            return self._seconds[at]
        low, high = self._rows[at - 1], self._rows[at]
        part = (rows - low) / (high - low)
        return self._seconds[at - 1] * (1 - part) + self._seconds[at] * part


class Odds:
    """How often draft tokens are right, in all sequences, by how many tokens agree before them."""

    def __init__(self) -> None:
        self._tries = [_GUESS_WEIGHT] * len(_AGREEING)
        self._right = [_GUESS_WEIGHT * guess for guess in _FIRST_GUESS]

    def of(self, agreeing: int) -> float:
        """The chance of a draft token before which so many agree (at least 2)."""
        at = bisect_right(_AGREEING, agreeing) - 1
        return self._right[at] / self._tries[at]

    def observe(self, agreeing: int, right: bool) -> None:
        """Learn from a draft token all before which were right."""
        at = bisect_right(_AGREEING, agreeing) - 1
        self._tries[at] = _KEPT * self._tries[at] + 1
        self._right[at] = _KEPT * self._right[at] + right


@dataclass
class Acceptance:
    """What became of one sequence's draft tokens.

    drafted, accepted: how many were verified, and how many of them were what the model says.
    right, expected: how many were right, and would have been by the odds of all sequences; the
        newest count most, and those that were not verified count too.
    """

    drafted: int = 0
    accepted: int = 0
    right: float = 0.0
    expected: float = 0.0

    def chance(self, odds: float) -> float:
        """A draft token's, if its odds in all sequences are these."""
        own = odds * (self.right + _CAUTION) / (self.expected + _CAUTION)
        return min(own, _HIGHEST)

    def observe(self, odds: float, right: bool) -> None:
        """Learn from a draft token all before which were right."""
        self.right = _OWN_KEPT * self.right + right
        self.expected = _OWN_KEPT * self.expected + odds


def accepted(
    draft: tuple[int, ...], sampled: list[Sampled | NoTokenError]
) -> list[Sampled | NoTokenError]:
    """The tokens that a sequence gets: those equal to its draft, and the first that is not.

    sampled: after the last token known and after each token of the draft; an error for a place at
    which there is none. Empty if nothing was sampled.
    """
    count = 0
    for token, found in zip(draft, sampled, strict=False):
        if isinstance(found, NoTokenError) or found[0] != token:
            break
        count += 1
    return sampled[: count + 1]


class Speculation:
    """Decides how many draft tokens are verified.

    max_tokens: the most of one sequence in one step. adaptive: whether costs and chances decide;
    otherwise all drafts are verified.
    """

    def __init__(self, max_tokens: int, *, adaptive: bool) -> None:
        self.max_tokens = max_tokens
        self._adaptive = adaptive
        self._costs = StepCosts()
        self._odds = Odds()

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        if self._adaptive:
            self._costs.observe(rows, seconds)

    def observe_tokens(self, draft: Draft, tokens: Several[int], acceptance: Acceptance) -> None:
        """Learn from the tokens that followed where ``draft`` was proposed (one or more).

        draft: all of it, whether it was verified or not.
        """
        if not self._adaptive:
            return
        for place, (token, found) in enumerate(zip(draft.tokens, tokens, strict=False)):
            agreeing = draft.agreeing + place
            acceptance.observe(self._odds.of(agreeing), token == found)
            self._odds.observe(agreeing, token == found)
            if token != found:
                break

    def lengths(self, rows: int, drafts: Several[tuple[Draft, Acceptance]]) -> list[int]:
        """How many tokens of each draft to verify; see :func:`draft_lengths`."""
        if not self._adaptive:
            return [len(draft.tokens) for draft, _ in drafts]
        chances = []
        for draft, acceptance in drafts:
            shares = (
                acceptance.chance(self._odds.of(draft.agreeing + place))
                for place in range(len(draft.tokens))
            )
            chances.append(list(accumulate(shares, mul)))
        return draft_lengths(self._costs, rows, chances)


def draft_lengths(costs: StepCosts, rows: int, chances: Several[Several[float]]) -> list[int]:
    """How many of each sequence's draft tokens to verify, so that tokens a second are most.

    rows: of the step without drafts. chances: for each sequence and each token of its draft, that
    it and all before it are accepted.
    """
    base = costs.of(rows)
    if base is None:
        return [len(own) for own in chances]
    worth = sorted(
        ((chance, index) for index, own in enumerate(chances) for chance in own), reverse=True
    )
    expected = float(len(chances))
    best, count = _MARGIN * expected / base, 0
    for taken, (value, _) in enumerate(worth, 1):
        expected += value
        rate = expected / (costs.of(rows + taken) or base)
        if rate > best:
            best, count = rate, taken
    lengths = [0] * len(chances)
    for _, index in worth[:count]:
        lengths[index] += 1
    return lengths
