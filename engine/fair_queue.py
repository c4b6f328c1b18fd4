"""Waiting sequences of several tenants, and what each tenant was served.

Each tenant has a virtual token counter: the tokens it was served, divided by its weight. A tenant
that had nothing queued comes back with at least the lowest counter of those that have, less a
credit, so that nobody saves up more service than that by staying away (Sheng et al. 2024, Fairness
in Serving Large Language Models; the credit is Linux's for tasks that slept).

Next is the prompt after which its tenant's counter would be lowest, not the tenant whose counter is
lowest now: so a prompt is complete no later, but for the step running when it comes, than if all
tenants were served at once in proportion to their weights (weighted fair queueing: Demers, Keshav,
Shenker 1989; the bound: Parekh, Gallager 1993).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from nybble.engine.sequence import Sequence

# An output token costs about two of the prompt (the weights of the paper's evaluation).
PROMPT_COST, OUTPUT_COST = 1.0, 2.0


class FairQueue:
    """First come, first served where there is one tenant."""

    def __init__(self, credit: float) -> None:
        """credit: tokens that a tenant may be ahead with when it comes back, if it had fewer."""
        self._credit = credit
        self._queues: dict[str, deque[Sequence]] = {}
        self._counters: dict[str, float] = {}
        self._last: str | None = None  # the last tenant whose queue became empty

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def tenants(self) -> list[str]:
        """Those with something queued."""
        return list(self._queues)

    def of(self, tenant: str) -> SequenceOf[Sequence]:
        """A tenant's sequences, the next first."""
        return self._queues.get(tenant, ())

    def counter_after(self, sequence: Sequence, cost: float) -> float:
        """The counter of the sequence's tenant once ``cost`` more is charged."""
        return self._counters[sequence.tenant] + cost / sequence.weight

    def push(self, sequence: Sequence, *, front: bool = False) -> None:
        """Queue a sequence behind its tenant's of no higher priority number.

        front: before all of them, as it was served before.
        """
        tenant = sequence.tenant
        if tenant not in self._queues:
            # With nobody queued, newcomers begin level with the last who was.
            others = self._queues or ([self._last] if self._last is not None else [])
            lowest = min((self._counters[other] for other in others), default=0.0)
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), lowest - self._credit)
            self._queues[tenant] = deque()
        if front:
            self._queues[tenant].appendleft(sequence)
            return
        queue, place = self._queues[tenant], len(self._queues[tenant])
        priority = sequence.request.priority
        while place and queue[place - 1].request.priority > priority:
            place -= 1
        queue.insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        self._queues[tenant].remove(sequence)
        if not self._queues[tenant]:
            del self._queues[tenant]
            self._last = tenant

    def charge(self, sequence: Sequence, cost: float) -> None:
        """Count service to the sequence's tenant."""
        self._counters[sequence.tenant] += cost / sequence.weight
