"""Which tokens of which sequences the next step computes.

A step has a token budget. Running sequences come first, oldest first: one token each while
decoding, a chunk of the prompt while prefilling. What is left of the budget admits waiting
sequences. When blocks run out, the youngest running sequence gives its blocks back and waits at the
head of the queue; it is recomputed later from its tokens (prompt and output), mostly from the
prefix cache.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from nybble.engine.block_manager import BlockManager
from nybble.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class ScheduledSequence:
    """``num_tokens`` tokens of a sequence from ``num_computed_tokens`` on."""

    sequence: Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the step reaches the last known token, so that a new one can be sampled."""
        return self.num_tokens == self.sequence.num_uncomputed_tokens


ScheduledBatch = list[ScheduledSequence]


class Scheduler:
    """Owns the queues; every sequence it knows is either waiting or running."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> ScheduledBatch:
        """The next step's batch; empty only when nothing is waiting or running."""
        batch: ScheduledBatch = []
        budget = self.max_batched_tokens
        preempted = False
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            count = min(sequence.num_uncomputed_tokens, budget)
            while not self.blocks.grow(sequence, sequence.num_computed_tokens + count):
                preempted = True
                if self._preempt_youngest() is sequence:
                    break
            else:
                batch.append(ScheduledSequence(sequence, count))
                budget -= count
                index += 1
        if not preempted:
            self._admit(batch, budget)
        return batch

    def _admit(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            cached = self.blocks.share_prefix(sequence)
            count = min(len(sequence.token_ids) - cached, budget)
            # The whole of it must fit now, else a long prompt and a short one could preempt each
            # other for ever.
            if self.blocks.blocks_for(len(sequence.token_ids)) - len(
                sequence.blocks
            ) > self.blocks.num_free_blocks or not self.blocks.grow(sequence, cached + count):
                self.blocks.release(sequence)
                return
            self.waiting.popleft()
            sequence.num_computed_tokens = cached
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = cached
                sequence.queue_seconds = time.monotonic() - sequence.arrived
                self.prefix_query_tokens += sequence.num_prompt_tokens
                self.prefix_hit_tokens += cached
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            batch.append(ScheduledSequence(sequence, count))
            budget -= count

    def _preempt_youngest(self) -> Sequence:
        sequence = self.running.pop()
        self.blocks.release(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)
        self.preemptions += 1
        return sequence

    def computed(self, item: ScheduledSequence) -> None:
        """Record that a scheduled item's keys and values are in the cache."""
        sequence = item.sequence
        before = sequence.num_computed_tokens
        sequence.num_computed_tokens += item.num_tokens
        self.blocks.publish(sequence, before)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and take its blocks back."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        self.blocks.release(sequence)
        sequence.status = SequenceStatus.FINISHED
