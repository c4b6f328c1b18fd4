"""Drafters: who proposes tokens that may follow a sequence, for a step to verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nybble.engine.sequence import Sequence
    from nybble.engine.speculation import StepCosts

# Whether another token of a sequence's draft may be worth what it costs, after tokens so graded.
Worth = Callable[["Sequence", Several[int]], bool]


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

    def release(self, sequence: Sequence) -> None:
        """Forget what is kept of a sequence, which has ended or gives its memory back."""
        ...
