"""Drafters: who proposes tokens that may follow a sequence, for a step to verify."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nybble.engine.inputs import StepItem
    from nybble.engine.sequence import Sequence
    from nybble.engine.speculation import StepCosts

# Whether another token of a sequence's draft may be worth what it costs, after tokens so graded.
Worth = Callable[["Sequence", Several[int]], bool]


# Of drafters that know how likely a token is, its grade is by its probability.
_PROBABILITIES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)
FIRST_GUESS = (0.15, 0.3, 0.5, 0.65, 0.8, 0.88, 0.93, 0.96)


def grade(probability: float) -> int:
    """The grade of a token that a drafter gives this probability; of as many as FIRST_GUESS has."""
    return bisect_right(_PROBABILITIES, probability)


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow a sequence.

    grades: of each token, how sure the drafter is of it: 0 is the least. What a grade is worth is
        learned while the engine runs.
    """

    tokens: tuple[int, ...]
    grades: tuple[int, ...]

    def first(self, count: int) -> Draft:
        """Its first ``count`` tokens."""
        return Draft(self.tokens[:count], self.grades[:count])


class Drafter(Protocol):
    """Owned by the engine thread.

    method: its name in metrics.
    first_guess: of each grade, what is taken for the chance that a token is right until it is
        known.
    costs: seconds of a pass that drafts a token of each of several sequences, by the tokens that it
        computes; None if drafting costs next to nothing.
    """

    @property
    def method(self) -> str: ...

    @property
    def first_guess(self) -> tuple[float, ...]: ...

    @property
    def costs(self) -> StepCosts | None: ...

    def draft(self, limits: Mapping[Sequence, int], worth: Worth) -> dict[Sequence, Draft]:
        """What may follow sequences of which one token is to be computed.

        limits: the most tokens of each. worth: asked before another pass is made for a sequence.
        """
        ...

    def reading(self, sequence: Sequence) -> float:
        """Seconds that it takes to read a sequence before it can be drafted, its prompt above all.

        0 if there is little to be read, or if it is not known yet.
        """
        ...

    def see(self, batch: Iterable[StepItem]) -> None:
        """Learn of a step that is computed: its sequences have their next tokens, and blocks."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget what is kept of a sequence, which has ended or gives its memory back."""
        ...
