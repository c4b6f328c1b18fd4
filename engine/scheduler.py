"""Which tokens of which sequences the next step computes.

A step has a token budget. Decoding sequences come first, one token each; what is left of the budget
prefills prompts in chunks, those already running before those that wait. When blocks run out, a
running sequence gives its blocks back and waits at the head of its queue; it is recomputed later
from its tokens (prompt and output), mostly from the prefix cache.

A sequence is admitted when everything it needs is there: a seat, a slot for its adapter, and blocks
for all of its tokens beside those that the running sequences need soon. One that lacks blocks, or a
slot or host memory for its adapter, may be overtaken by others a bounded number of times; then what
becomes free is kept for it.

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
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from enum import Enum

from nybble.engine.adapter_cache import AdapterCache, AdapterVersion
from nybble.engine.block_manager import BlockManager
from nybble.engine.drafter import Draft
from nybble.engine.fair_queue import OUTPUT_COST, PROMPT_COST, FairQueue
from nybble.engine.prompt_reader import PromptReader
from nybble.engine.sequence import NOTHING_CACHED, CachedPrefix, Sequence, SequenceStatus
from nybble.engine.speculation import Speculation

# Admissions that may pass a sequence which finds no slot or host memory for its adapter, or too few
# free blocks. After as many, what becomes free is kept for it.
_MAX_OVERTAKEN = 32
# Blocks of a waiting prompt that are looked up in the prefix cache in one step, on average.
_LOOKUPS_PER_STEP = 64
# Tokens that each running sequence must have room for before another is admitted. In simulations of
# four loads of which more waits than fits, none, 32 and 128 tokens gave 0.6 to 3.4, 0.0 to 1.2 and
# 0.0 to 0.4 preemptions a request; 128 computed up to a fifth less in the same time than 32.
_LOOKAHEAD = 32
_ROUNDING = 1e-6  # shares of a slot add up to one only nearly


class StepKind(Enum):
    """What a sequence does in a step.

    PREFILL: computes a part of its prompt, or of what it had before it was preempted. DECODE:
    computes its newest token alone and samples the next, and nothing else. VERIFY: computes draft
    tokens too, and samples a token after each.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    VERIFY = "verify"


@dataclass(frozen=True)
class ScheduledSequence:
    """What one sequence does in a step, settled when the step is scheduled.

    start, num_tokens: the positions computed, those of draft tokens included.
    completes: whether they reach the last token known.
    samples: whether a next token is sampled, which a request for the prompt alone does not.
    num_logits: the last positions after which a token is sampled.
    draft: tokens that may follow the last token known, and are verified.
    proposal: what was drafted, of which ``draft`` is the beginning or nothing.
    prompt_reader: reads the hidden states of these positions, if the request wants something of its
    prompt.
    """

    sequence: Sequence
    kind: StepKind
    start: int
    num_tokens: int
    completes: bool
    samples: bool
    num_logits: int
    prompt_reader: PromptReader | None = None
    draft: tuple[int, ...] = ()
    proposal: Draft | None = None

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        num_tokens: int,
        proposal: Draft | None = None,
        verified: int = 0,
    ) -> ScheduledSequence:
        """The next ``num_tokens`` tokens of a sequence as it is now, then some of its proposal."""
        start = sequence.num_computed_tokens
        if proposal is not None:
            draft = proposal.tokens[:verified]
            kind = StepKind.VERIFY if draft else StepKind.DECODE
            tokens, logits = num_tokens + verified, 1 + verified
            return cls(sequence, kind, start, tokens, True, True, logits, None, draft, proposal)
        completes = num_tokens == sequence.num_uncomputed_tokens
        samples = completes and sequence.max_tokens > 0
        reader = sequence.prompt_reader if start < sequence.num_prompt_tokens else None
        decodes = num_tokens == 1 and samples and reader is None
        kind = StepKind.DECODE if decodes else StepKind.PREFILL
        return cls(sequence, kind, start, num_tokens, completes, samples, int(samples), reader)

    @property
    def decodes(self) -> bool:
        return self.kind is StepKind.DECODE

    @property
    def verifies(self) -> bool:
        return bool(self.draft) and self.num_tokens == self.num_logits

    @property
    def token_ids(self) -> list[int]:
        """Of the positions computed."""
        if not self.draft:
            return self.sequence.token_ids[self.start : self.start + self.num_tokens]
        end = self.start + self.num_tokens - len(self.draft)
        return [*self.sequence.token_ids[self.start : end], *self.draft]


ScheduledBatch = list[ScheduledSequence]


@dataclass
class _Plan:
    """A step in the making.

    budget: tokens left. tokens: planned of each sequence. drafts: proposed beside them, and how
    many tokens of each are verified. preempted:
    whether a running sequence lost its blocks for want of others, after which nobody is admitted.
    slotless: the sequences which found no slot, or no host memory, for their adapter.
    blockless: those which found too few free blocks.
    """

    budget: int
    tokens: Counter[Sequence] = field(default_factory=Counter)
    drafts: dict[Sequence, tuple[Draft, int]] = field(default_factory=dict)
    preempted: bool = False
    slotless: list[Sequence] = field(default_factory=list)
    blockless: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns the queues; every sequence it knows is either waiting or running."""

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_batched_tokens: int,
        adapters: AdapterCache | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.speculation = speculation
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.adapters = adapters
        # Who comes while a step is running missed no more than that step.
        self.waiting = FairQueue(credit=max_batched_tokens)
        self.running: list[Sequence] = []  # the longest running first
        self._steps = 0
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
        self._steps += 1
        if self.adapters is not None:
            self.adapters.begin_step()
        for sequence in list(self.running):
            if sequence.num_uncomputed_tokens == 1:
                self._extend(plan, sequence, 1)
        self._prefill(plan)
        if self.speculation is not None and not plan.preempted:
            self._draft(plan, self.speculation)
        batch = [
            ScheduledSequence.of(sequence, plan.tokens[sequence], *plan.drafts.get(sequence, ()))
            for sequence in self.running
            if plan.tokens[sequence]
        ]
        if (states := self.block_manager.states) is not None:
            for item in batch:
                if (state := item.sequence.state) is not None:
                    known = len(item.sequence.token_ids)
                    states.plan(state, item.start, item.start + item.num_tokens, known)
        return batch

    def _prefill(self, plan: _Plan) -> None:
        """Spend what is left of the budget on prompts that are being read and on new ones."""
        unfinished: dict[str, deque[Sequence]] = defaultdict(deque)
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1:
                unfinished[sequence.tenant].append(sequence)
        ranks = {tenant: self._rank(queue[0]) for tenant, queue in unfinished.items()}
        for tenant in self.waiting.tenants:
            if tenant not in ranks:
                ranks[tenant] = self._rank(self.waiting.of(tenant)[0])
        while plan.budget and ranks:
            tenant = min(ranks, key=ranks.__getitem__)
            # A tenant's own prompts in the order they began, then those that wait.
            if begun := unfinished[tenant]:
                self._extend(plan, begun.popleft(), plan.budget)
            elif plan.preempted or not self._admit_one(plan, tenant):
                del ranks[tenant]
                continue
            following = begun or self.waiting.of(tenant)
            if following:
                ranks[tenant] = self._rank(following[0])
            else:
                del ranks[tenant]

    def _draft(self, plan: _Plan, speculation: Speculation) -> None:
        """Spend what nobody needs, of the budget and of free blocks, on drafts."""
        decoding = [
            sequence
            for sequence in self.running
            if plan.tokens[sequence] == sequence.num_uncomputed_tokens == 1
        ]
        room = {
            sequence: sequence.draft_room
            for sequence in decoding
            if sequence.prompt_reader is None and sequence.draft_room > 0
        }
        if not room or not plan.budget:
            return
        rows = speculation.rows(plan.tokens.total(), len(decoding))
        proposed = speculation.propose(rows, len(decoding), room, plan.budget)
        for sequence, (draft, length) in proposed.items():
            reached = sequence.num_computed_tokens + 1 + length
            if not (length and self.block_manager.grow(sequence, reached)):
                length = 0
            elif (states := self.block_manager.states) is not None and sequence.state is not None:
                length = states.verify(sequence.state, length)
            plan.drafts[sequence] = draft, length

    def _rank(self, sequence: Sequence) -> tuple[bool, float]:
        """The lowest comes first: who was overtaken too often, then by its finish tag."""
        return sequence.overtaken < _MAX_OVERTAKEN, self._finish_tag(sequence)

    def _finish_tag(self, sequence: Sequence) -> float:
        """Its tenant's counter once all of it is computed."""
        known = sequence.num_computed_tokens
        if sequence.status is SequenceStatus.WAITING:
            known = self._cached_prefix(sequence).tokens
        cost = PROMPT_COST * (len(sequence.token_ids) - known)
        return sequence.counter.value + cost / sequence.weight

    def _cached_prefix(self, sequence: Sequence) -> CachedPrefix:
        """What the prefix cache holds of a waiting sequence, or held a while ago.

        A lookup takes time in proportion to the prompt, so a long prompt is looked up again after
        proportionally many steps. What is found decides the order and what is worth trying; what
        is admitted is looked up anew.
        """
        if not sequence.may_share_prefix:
            return NOTHING_CACHED
        if self._steps >= sequence.prefix_valid_until:
            sequence.cached_prefix = self.block_manager.cached_prefix(sequence)
            blocks = len(sequence.token_ids) // self.block_manager.block_size
            sequence.prefix_valid_until = self._steps + 1 + blocks // _LOOKUPS_PER_STEP
        return sequence.cached_prefix

    def _extend(self, plan: _Plan, sequence: Sequence, limit: int) -> int:
        """Plan up to ``limit`` more tokens of a running sequence; returns how many."""
        planned = plan.tokens[sequence]
        count = min(sequence.num_uncomputed_tokens - planned, limit, plan.budget)
        if (states := self.block_manager.states) is not None and sequence.state is not None:
            count = states.limit(sequence.state, sequence.num_computed_tokens + planned, count)
        if count <= 0 or sequence.status is not SequenceStatus.RUNNING:
            return 0
        while not self.block_manager.grow(sequence, sequence.num_computed_tokens + planned + count):
            plan.preempted = True
            victim = self._victim()
            self._preempt(plan, victim)
            if victim is sequence:
                return 0
        plan.tokens[sequence] += count
        plan.budget -= count
        if sequence.num_charged_tokens < sequence.num_prompt_tokens:
            self._charge_prompt(sequence, sequence.num_computed_tokens + planned + count)
        return count

    def _charge_prompt(self, sequence: Sequence, reached: int) -> None:
        """Charge what was not charged yet: a tenant does not pay for being preempted."""
        charged = sequence.num_charged_tokens
        sequence.num_charged_tokens = max(charged, min(reached, sequence.num_prompt_tokens))
        cost = PROMPT_COST * (sequence.num_charged_tokens - charged)
        sequence.counter.value += cost / sequence.weight

    def _admit_one(self, plan: _Plan, tenant: str) -> bool:
        """Let the first of a tenant's sequences that can run begin; whether there was one.

        Everything is decided before anything is taken: a sequence which lacks one thing preempts
        nobody for another.
        """
        if any(passed.overtaken >= _MAX_OVERTAKEN for passed in plan.blockless):
            return False
        if (states := self.block_manager.states) is not None and not states.has_room():
            return False  # once this step is computed, there is
        for sequence in self.waiting.of(tenant):
            if sequence in plan.slotless:
                continue
            adapter = sequence.adapter
            if adapter is not None and self._adapters.lacks_memory(adapter):
                if sequence.overtaken >= _MAX_OVERTAKEN:
                    self._adapters.urge(adapter)
                plan.slotless.append(sequence)
                continue
            if not self._may_run(plan, sequence):
                continue
            victims = self._free_slot(sequence)
            if victims is None:
                plan.slotless.append(sequence)
                continue
            if not (self._free_seat(sequence, victims) and self._free_blocks(sequence, victims)):
                if self._has_a_claim(sequence):
                    plan.blockless.append(sequence)
                return False
            for victim in victims:
                self._preempt(plan, victim)
            self._begin(sequence)
            for passed in plan.blockless:
                passed.overtaken += 1
            for passed in plan.slotless:
                passed.overtaken += sequence.adapter is not None
            return self._extend(plan, sequence, plan.budget) > 0
        return False

    def _may_run(self, plan: _Plan, sequence: Sequence) -> bool:
        """Whether its adapter is in memory, and neither memory nor a slot is kept for another's."""
        if sequence.adapter is None:
            return True
        if not self._adapters.ready(sequence.adapter):
            return False
        return sequence.overtaken >= _MAX_OVERTAKEN or all(
            passed.overtaken < _MAX_OVERTAKEN for passed in plan.slotless
        )

    def _begin(self, sequence: Sequence) -> None:
        cached = self.block_manager.share_prefix(sequence)
        if sequence.adapter is not None:
            acquired = self._adapters.acquire(sequence.adapter)
            assert acquired, "the slot was found to be free"
        self.waiting.remove(sequence)
        sequence.num_computed_tokens = cached
        sequence.overtaken = 0
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = cached
            sequence.queue_seconds = time.monotonic() - sequence.arrived
            self.prefix_query_tokens += sequence.num_prompt_tokens
            self.prefix_hit_tokens += cached
            sequence.num_charged_tokens = cached
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)

    def _free_slot(self, sequence: Sequence) -> list[Sequence] | None:
        """Whom to preempt so that the sequence's adapter has a slot; None if it can have none."""
        adapter = sequence.adapter
        if adapter is None or self._adapters.can_acquire(adapter):
            return []
        if self._adapters.filled_in_step or not self._adapters.ready(adapter):
            return None

        def slots(running: Sequence) -> float:
            """A slot belongs in equal parts to the sequences that use it."""
            return 1 / running.adapter.running if running.adapter is not None else 0

        tenant = self._tenant_above_share(sequence, self.running, self._adapters.slots, slots, 1)
        taken = None if tenant is None else self._slot_of(tenant)
        if taken is None or not self._adapters.can_acquire(adapter, instead_of=taken):
            return None
        return [running for running in reversed(self.running) if running.adapter is taken]

    def _free_seat(self, sequence: Sequence, victims: list[Sequence]) -> bool:
        """Add to ``victims`` whom else to preempt for a seat; False if it can have none.

        Nobody above its share gets anything in this way, and the longest running sequence of a
        tenant is never taken, so everyone comes to an end.
        """
        while len(self.running) - len(victims) >= self.max_num_seqs:
            victim = self._above_share(sequence, victims, self.max_num_seqs, lambda _: 1, 1)
            if victim is None:
                return False
            victims.append(victim)
        return True

    def _free_blocks(self, sequence: Sequence, victims: list[Sequence]) -> bool:
        """Add to ``victims`` whom else to preempt for the blocks it needs; False if too few.

        All it will hold at once must fit now, else a long prompt and a short one could preempt
        each other for ever.
        """
        needed = self._most_blocks(sequence)
        reserve = self._reserve(victims)
        # At first as if none of the victims shared a block, which takes no time to find out.
        missing = needed + reserve - self.block_manager.num_free_blocks
        missing -= self._cached_prefix(sequence).blocks_in_use
        missing -= sum(victim.num_held_blocks for victim in victims)
        while missing > 0 or not self.block_manager.fits(sequence, needed + reserve, victims):
            victim = self._above_share(
                sequence,
                victims,
                self.block_manager.num_blocks,
                lambda running: running.num_held_blocks,
                needed,
            )
            if victim is None:
                if missing <= 0:
                    sequence.prefix_valid_until = 0  # less of it is cached than was known
                return False
            victims.append(victim)
            missing -= victim.num_held_blocks
        return True

    def _most_blocks(self, sequence: Sequence, more: int = 0, step: int | None = None) -> int:
        """Blocks it holds at once at most, up to ``more`` tokens beyond those it has."""
        step = self.max_batched_tokens if step is None else step
        return self.block_manager.most_blocks(len(sequence.token_ids) + more, step)

    def _reserve(self, leaving: Several[Sequence]) -> int:
        """Blocks to keep free for the sequences that run, without those that are leaving.

        For what is left of their prompts, and for the next few tokens of their outputs.
        """
        reserve = 0
        for sequence in self.running:
            if sequence not in leaving:
                more = min(_LOOKAHEAD, sequence.max_tokens - sequence.num_output_tokens)
                step = 1 if sequence.num_uncomputed_tokens == 1 else None
                most = self._most_blocks(sequence, more, step)
                reserve += max(0, most - sequence.num_held_blocks)
        return reserve

    def _has_a_claim(self, sequence: Sequence) -> bool:
        """Whether its tenant holds so little that others' blocks are to be kept for it."""
        held = sum(s.num_held_blocks for s in self.running if s.tenant == sequence.tenant)
        share = self._shares(self.block_manager.num_blocks)[sequence.tenant]
        return not held or held + self._most_blocks(sequence) <= share + _ROUNDING

    def _slot_of(self, tenant: str) -> AdapterVersion | None:
        """The youngest of the adapters only this tenant runs, but never its oldest."""
        shared = {s.adapter for s in self.running if s.tenant != tenant}
        own = [s.adapter for s in self.running if s.tenant == tenant and s.adapter is not None]
        candidates = (a for a in reversed(own) if a not in shared and a is not own[0])
        return next(candidates, None)

    def _above_share(
        self,
        newcomer: Sequence,
        leaving: Several[Sequence],
        capacity: int,
        usage: Callable[[Sequence], int],
        needed: int,
    ) -> Sequence | None:
        """The youngest sequence of the tenant that uses most above its share of ``capacity``."""
        staying = [running for running in self.running if running not in leaving]
        tenant = self._tenant_above_share(newcomer, staying, capacity, usage, needed)
        return next((s for s in reversed(staying) if s.tenant == tenant), None)

    def _tenant_above_share(
        self,
        newcomer: Sequence,
        running: Several[Sequence],
        capacity: int,
        usage: Callable[[Sequence], float],
        needed: int,
    ) -> str | None:
        """The tenant of several sequences that uses most above its share of ``capacity``.

        None where the newcomer itself would go above its tenant's share.
        """
        shares = self._shares(capacity)
        used: dict[str, float] = defaultdict(float)
        sequences: Counter[str] = Counter()
        for sequence in running:
            used[sequence.tenant] += usage(sequence)
            sequences[sequence.tenant] += 1
        if used[newcomer.tenant] + needed > shares[newcomer.tenant] + _ROUNDING:
            return None
        above = {
            tenant: used[tenant] / shares[tenant]
            for tenant in used
            if sequences[tenant] > 1 and used[tenant] > shares[tenant] + _ROUNDING
        }
        return max(above, key=above.__getitem__) if above else None

    def _shares(self, capacity: int) -> dict[str, float]:
        """Each tenant's share of ``capacity``, by weight, of those with anything to compute."""
        weights = {tenant: self.waiting.of(tenant)[0].weight for tenant in self.waiting.tenants}
        weights |= {sequence.tenant: sequence.weight for sequence in self.running}
        unit = capacity / sum(weights.values())
        return {tenant: weight * unit for tenant, weight in weights.items()}

    def _victim(self) -> Sequence:
        """The youngest of the tenant with most sequences for its weight, so never the oldest."""
        counts: Counter[str] = Counter(sequence.tenant for sequence in self.running)
        per_weight = {s.tenant: counts[s.tenant] / s.weight for s in self.running}
        most = max(per_weight.values())
        return next(s for s in reversed(self.running) if per_weight[s.tenant] == most)

    def _preempt(self, plan: _Plan, sequence: Sequence) -> None:
        plan.budget += plan.tokens.pop(sequence, 0)
        self.preempt(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks back and let it wait at the head of its queue."""
        self.running.remove(sequence)
        self.block_manager.release(sequence)
        if self.speculation is not None:
            self.speculation.release(sequence)
        sequence.num_computed_tokens = 0
        sequence.prefix_valid_until = 0
        sequence.status = SequenceStatus.WAITING
        self.waiting.push(sequence, front=True)
        if sequence.adapter is not None:
            self._adapters.preempt(sequence.adapter, sequence.tenant)
        self.preemptions += 1

    def computed(self, item: ScheduledSequence, sampled: int = 1) -> None:
        """Record that a scheduled item's keys and values are in the cache.

        sampled: the tokens it got, if it samples: one more than were accepted of its draft. What
        was not accepted is not in the cache, and its tenant does not pay for it.
        """
        sequence = item.sequence
        if item.samples:
            sequence.counter.value += OUTPUT_COST * sampled / sequence.weight
        before = sequence.num_computed_tokens
        accepted = max(sampled, 1) - 1 if item.draft else 0
        sequence.num_computed_tokens += item.num_tokens - len(item.draft) + accepted
        self.block_manager.publish(sequence, before, accepted)
        # The next step, which may write them for others, runs after the one that read them.
        self.block_manager.release_unseen(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and take its blocks back."""
        running = sequence.status is SequenceStatus.RUNNING
        if running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter, running=running)
        self.block_manager.release(sequence)
        if self.speculation is not None:
            self.speculation.release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def change_adapter(self, sequence: Sequence, version: AdapterVersion) -> None:
        """Have a sequence that has not begun use another version."""
        assert sequence.adapter is not None
        self._adapters.release(sequence.adapter, running=False)
        sequence.adapter = version
        sequence.block_hashes.clear()
        sequence.prefix_valid_until = 0
        self._adapters.queue(version, sequence.tenant)

    @property
    def _adapters(self) -> AdapterCache:
        assert self.adapters is not None, "a sequence has an adapter, but adapters are off"
        return self.adapters
