"""Which tokens of which sequences the next step computes.

A step has a token budget. Decoding sequences come first, one token each; what is left of the budget
prefills prompts in chunks, those already running before those that wait. When blocks run out, a
running sequence gives its blocks back and waits at the head of its queue; it is recomputed later
from its tokens (prompt and output), mostly from the prefix cache.

Tenants share the engine by weight. The budget goes to the prompt that would be complete first if
every tenant were served in proportion to its weight, token by token
(:mod:`nybble.engine.fair_queue`), so a tenant's crowd delays nobody else's prompt beyond its share
of the engine by more than the step that is running. A tenant below its share of sequences, blocks
or adapter slots takes them from one above its own. A share nobody claims is everyone's; with one
tenant all this is first come, first served.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from nybble.engine.adapter_cache import AdapterCache, AdapterVersion
from nybble.engine.block_manager import BlockManager, most_blocks
from nybble.engine.fair_queue import OUTPUT_COST, PROMPT_COST, FairQueue
from nybble.engine.prompt_reader import PromptReader
from nybble.engine.sequence import Sequence, SequenceStatus

# Admissions that may pass a sequence whose adapter finds no slot, before those that would keep the
# slots taken have to wait behind it.
_MAX_OVERTAKEN = 32
_ROUNDING = 1e-6  # shares of a slot add up to one only nearly


class StepKind(Enum):
    """What a sequence does in a step.

    PREFILL: computes a part of its prompt, or of what it had before it was preempted. DECODE:
    computes its newest token alone and samples the next, and nothing else.
    """

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class ScheduledSequence:
    """What one sequence does in a step, settled when the step is scheduled.

    start, num_tokens: the positions computed. completes: whether they reach the last token known.
    samples: whether a next token is sampled, which a request for the prompt alone does not.
    reader: reads the hidden states of these positions, if the request wants something of its
    prompt.
    """

    sequence: Sequence
    kind: StepKind
    start: int
    num_tokens: int
    completes: bool
    samples: bool
    reader: PromptReader | None = None

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """The next ``num_tokens`` tokens of a sequence as it is now."""
        start = sequence.num_computed_tokens
        completes = num_tokens == sequence.num_uncomputed_tokens
        samples = completes and sequence.max_tokens > 0
        reader = sequence.reader if start < sequence.num_prompt_tokens else None
        decodes = num_tokens == 1 and samples and reader is None
        kind = StepKind.DECODE if decodes else StepKind.PREFILL
        return cls(sequence, kind, start, num_tokens, completes, samples, reader)


ScheduledBatch = list[ScheduledSequence]


@dataclass
class _Plan:
    """A step in the making: tokens per sequence, what is left, who found no adapter slot."""

    budget: int
    tokens: Counter[Sequence] = field(default_factory=Counter)
    preempted: bool = False
    slotless: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns the queues; every sequence it knows is either waiting or running."""

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_batched_tokens: int,
        adapters: AdapterCache | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.adapters = adapters
        # Who comes while a step is running missed no more than that step.
        self.waiting = FairQueue(credit=max_batched_tokens)
        self.running: list[Sequence] = []  # the longest running first
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)
        if sequence.adapter is not None:
            self._adapters.queue(sequence.adapter, sequence.tenant)

    def schedule(self) -> ScheduledBatch:
        """The next step's batch; empty where nothing waits or runs, or adapters are being read."""
        plan = _Plan(self.max_batched_tokens)
        if self.adapters is not None:
            self.adapters.begin_step()
        for sequence in list(self.running):
            if sequence.num_uncomputed_tokens == 1:
                self._extend(plan, sequence, 1)
        self._prefill(plan)
        return [
            ScheduledSequence.of(sequence, plan.tokens[sequence])
            for sequence in self.running
            if plan.tokens[sequence]
        ]

    def _prefill(self, plan: _Plan) -> None:
        """Spend what is left of the budget on prompts that are being read and on new ones."""
        unfinished: dict[str, deque[Sequence]] = defaultdict(deque)
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1:
                unfinished[sequence.tenant].append(sequence)
        tags = {tenant: self._finish_tag(queue[0]) for tenant, queue in unfinished.items()}
        for tenant in self.waiting.tenants():
            if tenant not in tags:
                tags[tenant] = self._finish_tag(self.waiting.of(tenant)[0])
        while plan.budget and tags:
            tenant = min(tags, key=tags.__getitem__)
            # A tenant's own prompts in the order they began, then those that wait.
            if begun := unfinished[tenant]:
                self._extend(plan, begun.popleft(), plan.budget)
            elif plan.preempted or not self._admit_one(plan, tenant):
                del tags[tenant]
                continue
            following = begun or self.waiting.of(tenant)
            if following:
                tags[tenant] = self._finish_tag(following[0])
            else:
                del tags[tenant]

    def _finish_tag(self, sequence: Sequence) -> float:
        """Its tenant's counter once all of it is computed."""
        known = sequence.num_computed_tokens
        if sequence.status is SequenceStatus.WAITING and sequence.may_share_prefix:
            known = self.blocks.num_cached_tokens(sequence)
        return self.waiting.counter_after(sequence, PROMPT_COST * (len(sequence.token_ids) - known))

    def _extend(self, plan: _Plan, sequence: Sequence, limit: int) -> int:
        """Plan up to ``limit`` more tokens of a running sequence; returns how many."""
        planned = plan.tokens[sequence]
        count = min(sequence.num_uncomputed_tokens - planned, limit, plan.budget)
        if count <= 0 or sequence.status is not SequenceStatus.RUNNING:
            return 0
        while not self.blocks.grow(sequence, sequence.num_computed_tokens + planned + count):
            plan.preempted = True
            victim = self._victim()
            self._preempt(plan, victim)
            if victim is sequence:
                return 0
        plan.tokens[sequence] += count
        plan.budget -= count
        self._charge_prompt(sequence, sequence.num_computed_tokens + planned + count)
        return count

    def _charge_prompt(self, sequence: Sequence, reached: int) -> None:
        """Charge what was not charged yet: a tenant does not pay for being preempted."""
        charged = sequence.num_charged_tokens
        sequence.num_charged_tokens = max(charged, min(reached, sequence.num_prompt_tokens))
        self.waiting.charge(sequence, PROMPT_COST * (sequence.num_charged_tokens - charged))

    def _admit_one(self, plan: _Plan, tenant: str) -> bool:
        """Let the first of a tenant's sequences that can run begin; whether there was one."""
        for sequence in self.waiting.of(tenant):
            if sequence in plan.slotless or not self._may_run(plan, sequence):
                continue
            cached = self.blocks.share_prefix(sequence) if sequence.may_share_prefix else 0
            # All it will hold at once must fit now, else a long prompt and a short one could
            # preempt each other for ever.
            needed = most_blocks(
                len(sequence.token_ids),
                self.blocks.block_size,
                self.blocks.window,
                self.max_batched_tokens,
            )
            if not self._make_room(plan, sequence, needed):
                self.blocks.release(sequence)
                return False
            if sequence.adapter is not None and not self._take_slot(plan, sequence):
                self.blocks.release(sequence)
                plan.slotless.append(sequence)
                continue
            for passed in plan.slotless:
                passed.overtaken += sequence.adapter is not None
            self._begin(plan, sequence, cached)
            return self._extend(plan, sequence, plan.budget) > 0
        return False

    def _may_run(self, plan: _Plan, sequence: Sequence) -> bool:
        if sequence.adapter is None:
            return True
        if not self._adapters.ready(sequence.adapter):
            return False
        return all(passed.overtaken < _MAX_OVERTAKEN for passed in plan.slotless)

    def _begin(self, plan: _Plan, sequence: Sequence, cached: int) -> None:
        self.waiting.remove(sequence)
        sequence.num_computed_tokens = cached
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = cached
            sequence.queue_seconds = time.monotonic() - sequence.arrived
            self.prefix_query_tokens += sequence.num_prompt_tokens
            self.prefix_hit_tokens += cached
            sequence.num_charged_tokens = cached
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)

    def _make_room(self, plan: _Plan, sequence: Sequence, needed: int) -> bool:
        """Find a seat and ``needed`` blocks in all, others' beyond their share if need be.

        Nobody above its share gets anything in this way, and the longest running sequence of a
        tenant is never taken, so everyone comes to an end.
        """
        while len(self.running) >= self.max_num_seqs:
            victim = self._above_share(sequence, self.max_num_seqs, lambda _: 1, 1)
            if victim is None:
                return False
            self._preempt(plan, victim)
        while needed - sequence.num_held_blocks > self.blocks.num_free_blocks:
            victim = self._above_share(
                sequence, self.blocks.num_blocks, lambda running: running.num_held_blocks, needed
            )
            if victim is None:
                return False
            self._preempt(plan, victim)
        return True

    def _take_slot(self, plan: _Plan, sequence: Sequence) -> bool:
        """Pin the sequence's adapter, in a slot of a tenant beyond its share if need be."""
        adapter = sequence.adapter
        assert adapter is not None
        if self._adapters.acquire(adapter):
            return True
        if not self._adapters.all_pinned:
            return False  # this step has filled a slot already

        def slots(running: Sequence) -> float:
            """A slot belongs in equal parts to the sequences that use it."""
            return 1 / running.adapter.running if running.adapter is not None else 0

        tenant = self._tenant_above_share(sequence, self._adapters.slots, slots, 1)
        if tenant is None:
            return False
        victim = self._slot_of(tenant)
        if victim is None:
            return False
        for running in [s for s in reversed(self.running) if s.adapter is victim]:
            self._preempt(plan, running)
        return self._adapters.acquire(adapter)

    def _slot_of(self, tenant: str) -> AdapterVersion | None:
        """The youngest of the adapters only this tenant runs, but never its oldest."""
        shared = {s.adapter for s in self.running if s.tenant != tenant}
        own = [s.adapter for s in self.running if s.tenant == tenant and s.adapter is not None]
        candidates = (a for a in reversed(own) if a not in shared and a is not own[0])
        return next(candidates, None)

    def _above_share(
        self, newcomer: Sequence, capacity: int, usage: Callable[[Sequence], int], needed: int
    ) -> Sequence | None:
        """The youngest sequence of the tenant that uses most above its share of ``capacity``."""
        tenant = self._tenant_above_share(newcomer, capacity, usage, needed)
        return None if tenant is None else self._youngest(tenant)

    def _tenant_above_share(
        self, newcomer: Sequence, capacity: int, usage: Callable[[Sequence], float], needed: int
    ) -> str | None:
        """The tenant of several sequences that uses most above its share of ``capacity``.

        None where the newcomer itself would go above its tenant's share.
        """
        weights = {tenant: self.waiting.of(tenant)[0].weight for tenant in self.waiting.tenants()}
        used: dict[str, float] = defaultdict(float)
        sequences: Counter[str] = Counter()
        for sequence in self.running:
            weights[sequence.tenant] = sequence.weight
            used[sequence.tenant] += usage(sequence)
            sequences[sequence.tenant] += 1
        unit = capacity / sum(weights.values())
        if used[newcomer.tenant] + needed > weights[newcomer.tenant] * unit + _ROUNDING:
            return None
        above = {
            tenant: used[tenant] / weights[tenant]
            for tenant in used
            if sequences[tenant] > 1 and used[tenant] > weights[tenant] * unit + _ROUNDING
        }
        return max(above, key=above.__getitem__) if above else None

    def _victim(self) -> Sequence:
        """The youngest of the tenant with most sequences for its weight, so never the oldest."""
        counts: Counter[str] = Counter(sequence.tenant for sequence in self.running)
        per_weight = {s.tenant: counts[s.tenant] / s.weight for s in self.running}
        most = max(per_weight.values())
        return next(s for s in reversed(self.running) if per_weight[s.tenant] == most)

    def _youngest(self, tenant: str) -> Sequence:
        return next(s for s in reversed(self.running) if s.tenant == tenant)

    def _preempt(self, plan: _Plan, sequence: Sequence) -> None:
        plan.budget += plan.tokens.pop(sequence, 0)
        self.preempt(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks back and let it wait at the head of its queue."""
        self.running.remove(sequence)
        self.blocks.release(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING
        self.waiting.push(sequence, front=True)
        if sequence.adapter is not None:
            self._adapters.preempt(sequence.adapter, sequence.tenant)
        self.preemptions += 1

    def computed(self, item: ScheduledSequence) -> None:
        """Record that a scheduled item's keys and values are in the cache."""
        sequence = item.sequence
        if item.samples:
            self.waiting.charge(sequence, OUTPUT_COST)
        before = sequence.num_computed_tokens
        sequence.num_computed_tokens += item.num_tokens
        self.blocks.publish(sequence, before)
        # The next step, which may write them for others, runs after the one that read them.
        self.blocks.release_unseen(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and take its blocks back."""
        running = sequence.status is SequenceStatus.RUNNING
        if running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter, running=running)
        self.blocks.release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def change_adapter(self, sequence: Sequence, version: AdapterVersion) -> None:
        """Have a sequence that has not begun use another version."""
        assert sequence.adapter is not None
        self._adapters.release(sequence.adapter, running=False)
        sequence.adapter = version
        sequence.block_hashes.clear()
        self._adapters.queue(version, sequence.tenant)

    @property
    def _adapters(self) -> AdapterCache:
        assert self.adapters is not None, "a sequence has an adapter, but adapters are off"
        return self.adapters
