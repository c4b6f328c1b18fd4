"""Waiting sequences of several tenants, and how much each tenant was served.

Each tenant has a virtual token counter: the tokens it was served, divided by its weight. If a
tenant had nothing queued and comes back, its counter is raised to the lowest counter of the queued
tenants, less a credit. So no tenant can save up more than that credit by staying away (Sheng et al.
2024, Fairness in Serving Large Language Models; the credit is like Linux's for tasks that slept).

The scheduler takes the prompt after which its tenant's counter would be lowest, not the tenant
whose counter is lowest now. A prompt is then complete no later than if all tenants were served at
once in proportion to their weights, except for the step that runs when it arrives (weighted fair
queueing: Demers, Keshav, Shenker 1989; the bound: Parekh, Gallager 1993).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from nybble.engine.sequence import Sequence, VirtualCounter

# An output token costs as much as two prompt tokens (the weights in Sheng et al.'s evaluation).
PROMPT_COST, OUTPUT_COST = 1.0, 2.0


class FairQueue:
    """Waiting sequences by tenant. With one tenant it is first come, first served.

    tenants: those with something queued.
    """

    def __init__(self, credit: float) -> None:
        """credit: how far below the lowest counter a returning tenant's may be, in tokens."""
        self._credit = credit
        self._queues: dict[str, deque[Sequence]] = {}
        self.tenants = self._queues.keys()
        self._counters: dict[str, VirtualCounter] = {}
        self._last: str | None = None  # the last tenant whose queue became empty

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def of(self, tenant: str) -> SequenceOf[Sequence]:
        """A tenant's sequences, the next first."""
        return self._queues.get(tenant, ())

    def push(self, sequence: Sequence, *, front: bool = False) -> None:
        """Queue a sequence behind those of its tenant with an equal or lower priority number.

        It gets its tenant's counter, to which whoever serves it adds.

        front: put it before all of them instead, because it was preempted.
        """
        tenant = sequence.tenant
        if tenant not in self._queues:
            # If no tenant is queued, compare with the last one that was.
            others = self._queues or ([self._last] if self._last is not None else [])
            lowest = min((self._counters[other].value for other in others), default=0.0)
            counter = self._counters.setdefault(tenant, VirtualCounter())
            counter.value = max(counter.value, lowest - self._credit)
            self._queues[tenant] = deque()
        sequence.counter = self._counters[tenant]
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
