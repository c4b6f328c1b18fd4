"""The engine's statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

from nybble.engine.scheduler import ScheduledBatch, Scheduler


@dataclass(frozen=True)
class SizeCounts:
    """How often which size came up.

    counts: ``counts[i]`` sizes were at most 2**i and above 2**(i - 1).
    total: the sum of all sizes.
    """

    counts: tuple[int, ...] = ()
    total: int = 0

    def plus(self, size: int) -> SizeCounts:
        """These and one more; size ≥ 1."""
        bucket = (size - 1).bit_length()
        counts = [*self.counts, *[0] * (bucket + 1 - len(self.counts))]
        counts[bucket] += 1
        return SizeCounts(tuple(counts), self.total + size)


@dataclass(frozen=True)
class EngineStats:
    """A snapshot after the last step. Token, preemption and step figures count since the start.

    step_seconds: time spent in steps.
    step_sequences: how many sequences each step computed.
    step_tokens: how many tokens each step computed.
    failures: of the engine thread.
    restarts: after failures.
    draft_tokens, accepted_tokens: verified, and those that were what the model says.
    accepted_of_draft: how many tokens each draft brought, the one sampled after it included.
    state_slots_total, state_slots_held, state_snapshots: slots for states of layers that keep
        them, those of running sequences, and those with snapshots for the prefix cache.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    step_sequences: SizeCounts = field(default_factory=SizeCounts)
    step_tokens: SizeCounts = field(default_factory=SizeCounts)
    failures: int = 0
    restarts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_of_draft: SizeCounts = field(default_factory=SizeCounts)
    state_slots_total: int = 0
    state_slots_held: int = 0
    state_snapshots: int = 0

    @property
    def computed_tokens(self) -> int:
        """Of prompts and outputs."""
        return self.prompt_tokens + self.generation_tokens


@dataclass
class Counters:
    """What the engine thread counts, from its first start on; see :class:`EngineStats`."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    step_sequences: SizeCounts = field(default_factory=SizeCounts)
    step_tokens: SizeCounts = field(default_factory=SizeCounts)
    failures: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_of_draft: SizeCounts = field(default_factory=SizeCounts)

    def add_draft(self, tokens: int, accepted: int) -> None:
        """Count a draft that was verified."""
        self.draft_tokens += tokens
        self.accepted_tokens += accepted
        self.accepted_of_draft = self.accepted_of_draft.plus(accepted + 1)

    def add_step(self, batch: ScheduledBatch, seconds: float) -> None:
        """Count a step that has been computed."""
        self.steps += 1
        self.step_seconds += seconds
        self.step_sequences = self.step_sequences.plus(len(batch))
        self.step_tokens = self.step_tokens.plus(sum(item.num_tokens for item in batch))

    def snapshot(self, scheduler: Scheduler, restarts: int) -> EngineStats:
        states = scheduler.block_manager.states
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_total=scheduler.block_manager.num_blocks,
            kv_blocks_free=scheduler.block_manager.num_free_blocks,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            steps=self.steps,
            step_seconds=self.step_seconds,
            step_sequences=self.step_sequences,
            step_tokens=self.step_tokens,
            failures=self.failures,
            restarts=restarts,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            accepted_of_draft=self.accepted_of_draft,
            state_slots_total=states.num_slots if states else 0,
            state_slots_held=states.num_held if states else 0,
            state_snapshots=states.num_snapshots if states else 0,
        )
