"""How many draft tokens a step verifies, decided by what steps cost and what drafts have earned.

A draft token is accepted if it is what the sequence's own sampling chooses at its place, with the
random number, penalties and grammar of that place. So drafts change nothing but the speed: for a
draft that is certain of its tokens, that is rejection sampling.

A step over several rows takes longer than one over few, and a draft token that is rejected was
computed in vain. Both are measured while the engine runs: the seconds of a step by its rows, and
how often draft tokens are right, by how sure the drafter is of them. A step verifies as many draft
tokens as make the most tokens a second, which may be none: under load a row costs more than it
earns. A draft that is not verified teaches as well: its first token is compared with the one that
was sampled.

Drafting may cost time too: a draft model makes a pass for each token. Then the same is decided
before drafting, by what passes take and how often this drafter was right. Before the first draft
of a sequence the draft model reads the prompt: that is done if the tokens that the sequence is
expected to still get earn it. If drafting does not pay, a small part of the time is spent on
finding out whether it does again.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import accumulate, repeat
from math import prod
from operator import mul
from typing import TYPE_CHECKING

from nybble.engine.drafter import Draft, Drafter
from nybble.engine.request import NoTokenError
from nybble.engine.sampler import Sampled

if TYPE_CHECKING:
    from nybble.engine.inputs import StepItem
    from nybble.engine.sequence import Sequence

# The weight of the newest measurement of a number of rows, and the power of its change by which all
# others change: contexts grow together.
_OWN, _COMMON = 0.3, 0.33
# A longer step than expected by this factor was held up by something else.
_OUTLIER = 4.0
# A step with drafts must promise so many more tokens for each sequence than one without: the most
# promising of several estimates is too high on average.
_MARGIN = 0.03

# What is taken for a chance until it is known has the weight of so many observations. An
# observation's weight falls with each later one.
_GUESS_WEIGHT, _KEPT = 8.0, 0.98
# The chance of a token of which nothing is known but that some drafter will draft it.
_ANY_GUESS = 0.6
# A sequence's own chances differ from those of all by what it got over what was to be expected;
# both begin with so many tokens.
_CAUTION, _OWN_KEPT, _HIGHEST = 3.0, 0.95, 0.98
# The drafts that are verified are those of which most is expected, so that less comes of them than
# that: which share is learned. What is known of it fades with every token that was expected.
_KEPT_WEIGHT, _KEPT_FADES = 10.0, 0.98
# Of the time in which drafting does not pay, what is spent on drafts to learn from.
_TRIAL_SHARE = 0.005
# Tokens that a sequence is taken to still get, unless it may get fewer or got more already.
_USUAL_REST = 256


class StepCosts:
    """Seconds of a step by its rows, from the steps that were measured."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._seconds: list[float] = []
        self._once: set[int] = set()  # numbers of rows that were measured once

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        at = bisect_left(self._rows, rows)
        if at == len(self._rows) or self._rows[at] != rows:
            self._rows.insert(at, rows)
            self._seconds.insert(at, seconds)
            self._once.add(rows)
            return
        if rows in self._once:
            self._once.remove(rows)
            if seconds < self._seconds[at]:  # the first was held up by something else
                self._seconds[at] = seconds
                return
        own = 1 + _OWN * (min(seconds / self._seconds[at], _OUTLIER) - 1)
        # A power: what comes and goes at one number of rows leaves the others where they were, and
        # those that are not measured for long do not drift away.
        common = own**_COMMON
        self._seconds = [each * common for each in self._seconds]
        self._seconds[at] *= own / common

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
    """How often draft tokens are right, in all sequences, by their grades.

    first_guess: of each grade, what is taken for its chance until it is known.
    """

    def __init__(self, first_guess: Several[float]) -> None:
        self._tries = [_GUESS_WEIGHT] * (len(first_guess) + 1)  # the last: whatever the grade
        self._right = [_GUESS_WEIGHT * guess for guess in (*first_guess, _ANY_GUESS)]

    def of(self, grade: int) -> float:
        """The chance of a draft token with this grade."""
        return self._right[grade] / self._tries[grade]

    @property
    def of_any(self) -> float:
        """The chance of a draft token whose grade is not known yet."""
        return self.of(-1)

    def observe(self, grade: int, right: bool) -> None:
        """Learn from a draft token all before which were right."""
        for at in (grade, -1):
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
    """Decides how many tokens are drafted, and how many of them are verified.

    max_tokens: the most of one sequence in one step. adaptive: whether costs and chances decide;
    otherwise as many are drafted as can be, and all verified. prompt_row: what a token takes
    whose logits are not computed, of what one takes whose logits are.
    """

    def __init__(
        self, drafter: Drafter, max_tokens: int, *, adaptive: bool, prompt_row: float = 1.0
    ) -> None:
        self.max_tokens = max_tokens
        self._prompt_row = prompt_row
        self._drafter = drafter
        self._adaptive = adaptive
        self._costs = StepCosts()
        self._came = self._hoped = 0.0  # tokens of verified drafts, and what was expected of them
        self._odds = Odds(drafter.first_guess)
        self._drafting = 0.0  # seconds of this step
        self._without = 0.0  # seconds of steps since anything was drafted
        self._floor = 0.0  # the least chance for which another token is drafted
        self._tries = False  # whether this step drafts to learn

    @property
    def method(self) -> str:
        """The drafter's."""
        return self._drafter.method

    def rows(self, tokens: int, logits: int) -> int:
        """How many tokens with logits take as long as so many tokens, ``logits`` of them with."""
        return logits + round((tokens - logits) * self._prompt_row)

    def propose(
        self, rows: int, decoding: int, room: Mapping[Sequence, int], budget: int
    ) -> dict[Sequence, tuple[Draft, int]]:
        """Drafts of sequences that decode, and how many tokens of each to verify in this step.

        rows: of the step without drafts, as :meth:`rows` counts. decoding: of those, the ones of
        sequences that decode. room: the most tokens that a sequence can still be given
        as drafts. budget: the most tokens of all to verify.
        """
        started = time.monotonic()
        limits = {each: min(own, self.max_tokens) for each, own in room.items()}
        self._tries = False
        if self._adaptive and self._drafter.costs is not None:
            limits = self._limits(rows, decoding, limits, room, budget, self._drafter.costs)
        drafts = {}
        if limits:
            found = self._drafter.draft(limits, self._worth)
            drafts = {each: own for each, draft in found.items() if (own := _allowed(each, draft))}
        known = [(draft, each.acceptance) for each, draft in drafts.items()]
        lengths = self.lengths(rows, decoding, known, budget)
        if self._adaptive and known and not any(lengths):
            lengths = self._verified_to_learn(rows, known, budget)
        elif any(lengths):
            self._without = 0.0
        self._drafting = time.monotonic() - started
        return dict(zip(drafts, zip(drafts.values(), lengths, strict=True), strict=True))

    def see(self, batch: Iterable[StepItem]) -> None:
        """Show the drafter a step that is computed; see :class:`nybble.engine.drafter.Drafter`."""
        self._drafter.see(batch)

    def release(self, sequence: Sequence) -> None:
        """Forget what is kept of a sequence, which has ended or gives its memory back."""
        self._drafter.release(sequence)

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a step, which took so long with its drafting.

        rows: as :meth:`rows` counts.
        """
        if self._adaptive:
            self._costs.observe(rows, max(seconds - self._drafting, 0.0))
            self._without += seconds
        self._drafting = 0.0

    def observe_tokens(
        self, draft: Draft, verified: int, tokens: Several[int], acceptance: Acceptance
    ) -> None:
        """Learn from the tokens that followed where ``draft`` was proposed (one or more).

        draft: all of it, of which the first ``verified`` tokens were.
        """
        if not self._adaptive:
            return
        if verified:
            hoped = sum(self._chances(draft.first(verified), acceptance))
            fading = _KEPT_FADES**hoped
            self._hoped = fading * self._hoped + hoped
            self._came = fading * self._came + len(tokens) - 1
        for token, grade, found in zip(draft.tokens, draft.grades, tokens, strict=False):
            acceptance.observe(self._odds.of(grade), token == found)
            self._odds.observe(grade, token == found)
            if token != found:
                break

    def lengths(
        self, rows: int, decoding: int, drafts: Several[tuple[Draft, Acceptance]], budget: int
    ) -> list[int]:
        """How many tokens of each draft to verify; see :func:`draft_lengths`."""
        if not self._adaptive:
            lengths = []
            for draft, _ in drafts:
                lengths.append(min(len(draft.tokens), budget))
                budget -= lengths[-1]
            return lengths
        kept = self._kept
        chances = [[kept * own for own in self._chances(*each)] for each in drafts]
        return draft_lengths(self._costs, rows, decoding, chances, budget)

    @property
    def _kept(self) -> float:
        """What comes of verified drafts, over what was expected."""
        return min((self._came + _KEPT_WEIGHT) / (self._hoped + _KEPT_WEIGHT), 1.0)

    def _chances(self, draft: Draft, acceptance: Acceptance) -> list[float]:
        """Of each token of a draft, that it and all before it are accepted."""
        own = (acceptance.chance(self._odds.of(grade)) for grade in draft.grades)
        return list(accumulate(own, mul))

    def _limits(
        self,
        rows: int,
        decoding: int,
        limits: dict[Sequence, int],
        room: Mapping[Sequence, int],
        budget: int,
        passes: StepCosts,
    ) -> dict[Sequence, int]:
        """How many tokens of each sequence to draft, if passes that draft cost time.

        room: the most tokens that each can still be given as drafts, in all its steps.
        """
        chances = [
            list(accumulate(repeat(each.acceptance.chance(self._odds.of_any), limit), mul))
            for each, limit in limits.items()
        ]
        lengths = draft_lengths(self._costs, rows, decoding, chances, budget, passes)
        chosen = {each: count for each, count in zip(limits, lengths, strict=True) if count}
        self._floor = 0.0
        base, one = self._costs.of(rows), passes.of(len(chosen) or 1)
        if base is None:
            return chosen
        if chosen:
            # What a token takes without drafts, and what one takes that is drafted: its part of a
            # pass, and a row.
            token = (self._costs.of(decoding) or base) / decoding
            row = (self._costs.of(rows + len(chosen)) or base) - base
            cost = ((one or 0.0) + row) / len(chosen)
            chosen = {
                each: count
                for each, count, own in zip(limits, lengths, chances, strict=True)
                if count
                and (
                    not (reading := self._drafter.reading(each))
                    or reading
                    < _earned(sum(own[:count]), count, token, cost) * _rest(each, room[each])
                )
            }
        if not chosen:
            return self._trial(limits, passes)
        self._without = 0.0
        if one is not None:
            self._floor = cost / token
        return chosen

    def _trial(self, limits: dict[Sequence, int], passes: StepCosts) -> dict[Sequence, int]:
        """One token of the sequence that costs least, if the time for that has come."""
        cheapest = min(limits, key=self._drafter.reading)
        seconds = self._drafter.reading(cheapest) + (passes.of(1) or 0.0)
        if seconds > _TRIAL_SHARE * self._without:
            return {}
        self._without, self._tries = 0.0, True
        return {cheapest: 1}

    def _verified_to_learn(
        self, rows: int, drafts: Several[tuple[Draft, Acceptance]], budget: int
    ) -> list[int]:
        """How many tokens of each draft to verify, none of which pays by what is known.

        What was drafted to learn is verified, and else one draft if the time for that has come:
        what a step takes may have been measured wrongly, and would never be measured again.
        """
        lengths = [0] * len(drafts)
        longest = max(range(len(drafts)), key=lambda place: len(drafts[place][0].tokens))
        length = min(len(drafts[longest][0].tokens), budget)
        base = self._costs.of(rows) or 0.0
        # Each row as much as a step without: more is hardly true.
        more = min((self._costs.of(rows + length) or 0.0) - base, base * length)
        if self._tries or more <= _TRIAL_SHARE * self._without:
            lengths[longest], self._without = length, 0.0
        return lengths

    def _worth(self, sequence: Sequence, grades: Several[int]) -> bool:
        """See :data:`nybble.engine.drafter.Worth`."""
        if not self._floor:
            return True
        own = [self._odds.of_any, *map(self._odds.of, grades)]
        return prod(map(sequence.acceptance.chance, own)) >= self._floor


def _earned(accepted: float, drafted: int, token: float, cost: float) -> float:
    """Seconds that drafts save with each token of a sequence.

    accepted, drafted: tokens of a draft. token: seconds of a token without drafts. cost: seconds of
    drafting and verifying one.
    """
    return (accepted * token - drafted * cost) / (1 + accepted)


def _rest(sequence: Sequence, room: int) -> int:
    """How many tokens a sequence is expected to still get, which may get ``room`` and one.

    Of an end that is not known half is expected to be over.
    """
    return min(room + 1, max(_USUAL_REST, sequence.num_output_tokens))


def _allowed(sequence: Sequence, draft: Draft) -> Draft | None:
    """The beginning of a draft that its sequence's guide allows; None if nothing is left."""
    guide = sequence.request.guide
    if guide is not None:
        draft = draft.first(guide.accepts(draft.tokens))
    return draft if draft.tokens else None


def draft_lengths(
    costs: StepCosts,
    rows: int,
    decoding: int,
    chances: Several[Several[float]],
    budget: int,
    passes: StepCosts | None = None,
) -> list[int]:
    """How many of each sequence's draft tokens to verify, so that tokens a second are most.

    rows: of the step without drafts. decoding: of those, the ones of sequences that decode. A token
    of each is made whatever is drafted; what else the step computes counts as the tokens that could
    be decoded in that time. chances: for each draft and each of its tokens, that it and all before
    it are accepted. budget: the most tokens. passes: if the tokens are still to be drafted, what a
    pass takes that drafts one of each of several sequences.
    """
    lengths = [0] * len(chances)
    base = costs.of(rows)
    if base is None:
        for index, own in enumerate(chances):
            lengths[index] = min(len(own), budget)
            budget -= lengths[index]
        return lengths
    worth = sorted(
        ((chance, index) for index, own in enumerate(chances) for chance in own), reverse=True
    )[:budget]
    expected = decoding * base / (costs.of(decoding) or base)
    best, count = (expected + _MARGIN * decoding) / base, 0
    drafting, sizes = 0.0, [0] * max(map(len, chances), default=0)
    taken_of = [0] * len(chances)
    for taken, (value, index) in enumerate(worth, 1):
        expected += value
        if passes is not None:
            place = taken_of[index]
            taken_of[index] += 1
            before, sizes[place] = sizes[place], sizes[place] + 1
            drafting += (passes.of(before + 1) or 0.0) - ((passes.of(before) or 0.0) * (before > 0))
        rate = expected / ((costs.of(rows + taken) or base) + drafting)
        if rate > best:
            best, count = rate, taken
    for _, index in worth[:count]:
        lengths[index] += 1
    return lengths
