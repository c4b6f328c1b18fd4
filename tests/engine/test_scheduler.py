"""What the scheduler decides costs little, and what it admits can go on."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nybble.engine import Request, SamplingParams
from nybble.engine.block_manager import BlockManager
from nybble.engine.scheduler import ScheduledBatch, Scheduler, StepKind
from nybble.engine.sequence import Sequence

BLOCK = 16


def add(
    scheduler: Scheduler, prompt: tuple[int, ...], max_tokens: int, tenant: str = ""
) -> Sequence:
    request = Request("r", prompt, SamplingParams(max_tokens=max_tokens), tenant=tenant)
    sequence = Sequence(request, max_tokens, detokenizer=None, sampler=None)  # type: ignore[arg-type]
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler, token: int = 0) -> ScheduledBatch:
    batch = scheduler.schedule()
    for item in batch:
        scheduler.computed(item)
        if item.completes:
            item.sequence.token_ids.append(token)
            if item.sequence.num_output_tokens >= item.sequence.max_tokens:
                scheduler.finish(item.sequence)
    return batch


def test_a_step_says_what_each_sequence_does() -> None:
    scheduler = Scheduler(BlockManager(100, BLOCK), 4, 16)
    sequence = add(scheduler, tuple(range(40)), 2)
    found = [step(scheduler)[0] for _ in range(4)]
    assert [item.kind for item in found] == [StepKind.PREFILL] * 3 + [StepKind.DECODE]
    assert [(item.start, item.num_tokens) for item in found] == [
        (0, 16),
        (16, 16),
        (32, 8),
        (40, 1),
    ]
    assert [item.completes for item in found] == [False, False, True, True]
    assert [item.samples for item in found] == [False, False, True, True]
    assert sequence.num_output_tokens == 2, "what a step was says nothing of what came after"


def test_a_prompt_alone_completes_and_samples_nothing() -> None:
    scheduler = Scheduler(BlockManager(100, BLOCK), 4, 16)
    add(scheduler, (5,), 0)
    (item,) = scheduler.schedule()
    assert (item.kind, item.completes, item.samples) == (StepKind.PREFILL, True, False)


@pytest.mark.parametrize("tenants", [1, 8])
def test_a_long_cached_prompt_that_waits_is_not_looked_up_at_every_step(
    monkeypatch: pytest.MonkeyPatch, tenants: int
) -> None:
    tokens, steps = 32_000, 500
    scheduler = Scheduler(BlockManager(2 * tokens // BLOCK, BLOCK), 1, 512)
    prompt = tuple(range(tokens))
    add(scheduler, prompt, 1)
    while step(scheduler):
        pass
    add(scheduler, (5,), 10_000)
    step(scheduler)
    for tenant in range(tenants):
        add(scheduler, (*prompt, 1), 10, f"{tenant}")
    looked_up = 0
    cached = BlockManager._cached

    def counted(self: BlockManager, sequence: Sequence) -> Any:
        nonlocal looked_up
        found = cached(self, sequence)
        looked_up += sum(len(table.blocks) for table in found.tables)
        return found

    monkeypatch.setattr(BlockManager, "_cached", counted)
    for _ in range(steps):
        step(scheduler)
    blocks = tokens // BLOCK
    assert len(scheduler.waiting) == tenants
    assert looked_up <= tenants * (blocks + 64 * steps)
    # What the cache holds is still known: the prompt begins where it ends.
    scheduler.finish(scheduler.running[0])
    (first,) = scheduler.schedule()
    assert first.start == tokens


@pytest.mark.parametrize("seed", range(3))
def test_what_is_admitted_is_seldom_preempted(seed: int) -> None:
    """Always more waiting than fits; how long an output becomes is not known before."""
    chance = random.Random(seed)
    scheduler = Scheduler(BlockManager(300, BLOCK), 32, 256)
    ends: dict[Sequence, int] = {}
    finished = computed = useful = 0
    for _ in range(1500):
        while len(scheduler.waiting) < 32:
            prompt = tuple(chance.choices(range(9999), k=chance.randint(1, 200)))
            sequence = add(scheduler, prompt, 2000)
            ends[sequence] = len(prompt) + min(2000, round(chance.expovariate(1 / 150)) + 1)
        batch = step(scheduler, chance.randrange(9999))
        computed += sum(item.num_tokens for item in batch)
        for sequence in list(scheduler.running):
            if len(sequence.token_ids) >= ends[sequence]:
                scheduler.finish(sequence)
                finished += 1
                useful += ends[sequence]
    assert finished > 100
    assert scheduler.preemptions < 0.2 * finished
    assert computed < 1.2 * useful
    assert scheduler.block_manager.num_free_blocks < 100, "the reserve is no more than is needed"
