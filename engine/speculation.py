"""How many draft tokens a step verifies, decided by what steps cost and what drafts have earned.

A draft token is accepted if it is what the sequence's own sampling chooses at its place, with the
random number, penalties and grammar of that place. So drafts change nothing but the speed: for a
draft that is certain of its tokens, that is rejection sampling.

A step over several rows takes longer than one over few, and a draft token that is rejected was
computed in vain. Both are measured while the engine runs: the seconds of a step by its rows, and
for each sequence the share of draft tokens that was accepted. A step verifies as many draft tokens
as make the most tokens a second, which may be none: under load a row costs more than it earns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Several
from dataclasses import dataclass

from nybble.engine.request import NoTokenError
from nybble.engine.sampler import Sampled

# Weights of the newest measurement: of its own number of rows, and of all steps, whose contexts
# grow together.
_OWN, _COMMON = 0.3, 0.1
# A longer step than expected by this factor was held up by something else.
_OUTLIER = 4.0


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


@dataclass
class Acceptance:
    """What became of one sequence's draft tokens.

    drafted, accepted: how many were verified, and how many of them were what the model says.
    share: of accepted ones, the newest counting most. What follows a rejected token was not tried
        and does not count.
    """

    drafted: int = 0
    accepted: int = 0
    share: float = 0.5

    def observe(self, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted
        for _ in range(accepted):
            self.share += 0.1 * (1 - self.share)
        if accepted < drafted:
            self.share -= 0.2 * self.share


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

    max_tokens: the most of one sequence in one step. adaptive: whether costs decide; otherwise all
    drafts are verified.
    """

    def __init__(self, max_tokens: int, *, adaptive: bool) -> None:
        self.max_tokens = max_tokens
        self._costs = StepCosts() if adaptive else None

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        if self._costs is not None:
            self._costs.observe(rows, seconds)

    def lengths(self, rows: int, drafts: Several[tuple[int, float]]) -> list[int]:
        """How many tokens of each draft to verify; see :func:`draft_lengths`."""
        if self._costs is None:
            return [length for length, _ in drafts]
        return draft_lengths(self._costs, rows, drafts)


def draft_lengths(costs: StepCosts, rows: int, drafts: Several[tuple[int, float]]) -> list[int]:
    """How many of each sequence's draft tokens to verify, so that tokens a second are most.

    rows: of the step without drafts. drafts: for each sequence the tokens drafted and its share of
    accepted ones.
    """
    # The n-th draft token of a sequence is worth something only if all before it are accepted.
    worth = sorted(
        (
            (share**place, index)
            for index, (length, share) in enumerate(drafts)
            for place in range(1, length + 1)
        ),
        reverse=True,
    )
    expected = float(len(drafts))
    base = costs.of(rows)
    best, count = expected / base if base else 0.0, 0
    if base is None:
        return [length for length, _ in drafts]
    for taken, (value, _) in enumerate(worth, 1):
        expected += value
        rate = expected / (costs.of(rows + taken) or base)
        if rate > best:
            best, count = rate, taken
    lengths = [0] * len(drafts)
    for _, index in worth[:count]:
        lengths[index] += 1
    return lengths
