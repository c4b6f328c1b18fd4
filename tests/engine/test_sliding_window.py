"""Blocks behind the sliding windows of layers are freed, and nobody notices."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import Engine, EngineConfig, Request, SamplingParams
from nybble.engine.block_manager import BlockManager
from nybble.engine.inputs import InputBuffers
from nybble.engine.kv_cache import KVCacheLayout, most_blocks
from nybble.engine.scheduler import ScheduledBatch, Scheduler
from nybble.engine.sequence import Sequence, SequenceStatus
from nybble.models import architecture_of

WINDOW, BLOCK, BUDGET = 24, 4, 16
# A step's tokens and the windows of all of them: 24 + 16 − 1 tokens reach into 11 blocks.
MOST_PREFILLING, MOST_DECODING = 11, 7


def start(checkpoint: Any, blocks: int, dtype: torch.dtype = torch.float32) -> Engine:
    config = EngineConfig(dtype=dtype, block_size=BLOCK, max_num_seqs=6, max_batched_tokens=BUDGET)
    layout = KVCacheLayout.of(architecture_of(checkpoint.config), config, 512)
    config = replace(config, kv_cache_bytes=blocks * layout.block_bytes)
    engine = Engine.load(checkpoint, config, progress=False)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def windowed(plain_checkpoint: Callable[..., Any]) -> Any:
    return plain_checkpoint(family="mistral", sliding_window=WINDOW)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 200, (length,), generator=generator).tolist())


async def generate(engine: Engine, ids: tuple[int, ...], count: int) -> tuple[list[int], list[int]]:
    """The greedy tokens, and how many blocks were in use when each of them came."""
    tokens, used = [], []
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    async for output in engine.generate(Request("r", ids, params)):
        stats = engine.stats()
        used.append(stats.kv_blocks_total - stats.kv_blocks_free)
        tokens += output.token_ids
    return tokens, used


@pytest.mark.parametrize(
    ("length", "count"), [(100, 150), pytest.param(3, 300, marks=pytest.mark.slow), (300, 20)]
)
def test_a_context_far_longer_than_the_cache_gives_the_tokens_of_transformers(
    windowed: Any, length: int, count: int
) -> None:
    ids = prompt(length, length)
    model = AutoModelForCausalLM.from_pretrained(windowed.folder, dtype=torch.float32)
    expected = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, length, dtype=torch.long),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )[0, length:].tolist()
    engine = start(windowed, MOST_PREFILLING)
    try:
        assert engine.kv_cache_tokens(512) == 512, "a sequence keeps 44 tokens"
        assert engine.max_model_len == 512
        for _ in range(2):  # the second time around with a prefix cache
            found, used = asyncio.run(generate(engine, ids, count))
            assert found == expected
            assert max(used[1:]) <= MOST_DECODING
        stats = engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks_total
        assert stats.preemptions == 0
    finally:
        engine.stop()


def test_the_kernels_of_the_cpu_give_the_same_tokens_with_a_small_cache_and_a_large_one(
    windowed: Any,
) -> None:
    found = []
    for blocks in (MOST_PREFILLING, 1000):
        engine = start(windowed, blocks, torch.bfloat16)
        try:
            found.append(asyncio.run(generate(engine, prompt(1, 150), 100))[0])
        finally:
            engine.stop()
    assert found[0] == found[1]


def test_a_sequence_is_no_longer_than_the_cache_where_that_does_not_hold_a_window(
    windowed: Any, plain_checkpoint: Callable[..., Any]
) -> None:
    for checkpoint, blocks in (
        (windowed, MOST_PREFILLING - 1),
        (plain_checkpoint(family="mistral"), MOST_PREFILLING),
    ):
        engine = start(checkpoint, blocks)
        engine.stop()
        assert engine.max_model_len == blocks * BLOCK


def test_one_layer_without_a_window_keeps_every_block() -> None:
    def window(**settings: Any) -> int:
        config = AutoConfig.for_model("qwen2", num_hidden_layers=4, **settings)
        return architecture_of(config).window

    sliding = {"use_sliding_window": True, "sliding_window": 24}
    assert window(**sliding, max_window_layers=0) == 24
    assert window(**sliding, max_window_layers=1) == 0
    assert window() == 0


class ShadowCache:
    """A scheduler's steps without a model: each slot keeps what its keys and values follow from,
    the tokens from the start of the sequence on, and every slot that a token sees is looked at."""

    def __init__(
        self, blocks: int, block_size: int, windows: tuple[int, ...], seats: int, budget: int
    ) -> None:
        self.manager = BlockManager(blocks, block_size, windows=windows)
        self.scheduler = Scheduler(self.manager, seats, budget)
        # What a slot holds is of one group, and nobody else's.
        self.slots: list[tuple[int, int] | None] = [None] * (blocks * block_size)
        self.inputs = InputBuffers(
            max_seqs=seats,
            max_tokens=budget,
            max_blocks=-(-400 // block_size),
            block_size=block_size,
            group_of_layer=range(len(windows)),
            device=torch.device("cpu"),
        )
        self.most_held = 0

    def add(self, ids: tuple[int, ...], max_tokens: int, tenant: str = "") -> Sequence:
        request = Request("r", ids, SamplingParams(max_tokens=max_tokens), tenant=tenant)
        sequence = Sequence(request, max_tokens, detokenizer=None, sampler=None)  # type: ignore[arg-type]
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> bool:
        """Compute one; returns whether there was any."""
        batch = self.scheduler.schedule()
        if not batch:
            return False
        self._attend(batch)
        for item in batch:
            sequence, completes = item.sequence, item.completes
            self.most_held = max(self.most_held, sequence.num_held_blocks)
            self.scheduler.computed(item)
            if completes:
                sequence.token_ids.append(len(sequence.token_ids) % 7)
                if sequence.num_output_tokens == sequence.max_tokens:
                    self.scheduler.finish(sequence)
        self.check_blocks()
        return True

    def _attend(self, batch: ScheduledBatch) -> None:
        attention = self.inputs.build(batch).attention
        prefixes = {item.sequence: _prefixes(item.sequence.token_ids) for item in batch}
        for group, of_group in enumerate(attention):
            slots = iter(of_group.slot_mapping.tolist())
            for item in batch:
                start = item.sequence.num_computed_tokens
                for position in range(start, start + item.num_tokens):
                    self.slots[next(slots)] = group, prefixes[item.sequence][position]
        size = self.manager.block_size
        for group, window in enumerate(self.manager.windows):
            tables = attention[group].block_tables.tolist()
            for table, item in zip(tables, batch, strict=False):
                start = item.sequence.num_computed_tokens
                first = max(0, start - window + 1) if window else 0
                for position in range(first, start + item.num_tokens):
                    slot = table[position // size] * size + position % size
                    assert self.slots[slot] == (group, prefixes[item.sequence][position])

    def check_blocks(self) -> None:
        """Every block is free or held, and who holds one needs it."""
        held: set[int] = set()
        block_size = self.manager.block_size
        for sequence in self.scheduler.running:
            for table, window in zip(sequence.block_tables, self.manager.windows, strict=True):
                seen = sequence.num_computed_tokens - window + 1
                assert table.num_unseen == (max(0, seen) // block_size if window else 0)
                held.update(table.held)
            of_sequence = [block for table in sequence.block_tables for block in table.held]
            assert len(set(of_sequence)) == len(of_sequence) == sequence.num_held_blocks
        assert len(held) + self.manager.num_free_blocks == self.manager.num_blocks


def _prefixes(tokens: list[int]) -> list[int]:
    found, prefix = [], 0
    for token in tokens:
        prefix = hash((prefix, token))
        found.append(prefix)
    return found


def test_a_long_prompt_and_a_long_output_hold_no_more_than_the_window() -> None:
    # Chunks of 15, so that they begin anywhere in a block.
    cache = ShadowCache(100, BLOCK, (WINDOW,), seats=1, budget=15)
    sequence = cache.add(prompt(0, 200), max_tokens=150)
    while sequence.num_output_tokens < 1:
        assert cache.step()
    assert cache.most_held == most_blocks(400, BLOCK, (WINDOW,), 15) == 11
    cache.most_held = 0
    while cache.step():
        pass
    assert cache.most_held == MOST_DECODING == most_blocks(400, BLOCK, (WINDOW,), 1)
    assert sequence.num_output_tokens == 150


def test_sequences_run_together_whose_contexts_would_not_fit() -> None:
    blocks = 5 * MOST_DECODING + MOST_PREFILLING  # 184 tokens
    cache = ShadowCache(blocks, BLOCK, (WINDOW,), seats=6, budget=BUDGET)
    for seed in range(6):
        cache.add(prompt(seed, 100), max_tokens=100)
    together = 0
    while cache.step():
        together = max(together, len(cache.scheduler.running))
    assert together == 6
    assert cache.manager.num_free_blocks == blocks
    assert cache.scheduler.preemptions == 0


@pytest.mark.parametrize("cached", [0, 100])
def test_a_sequence_begins_when_all_it_will_hold_at_once_fits(cached: int) -> None:
    """Had it to be preempted for lack of blocks, it would have begun in vain."""
    cache = ShadowCache(2 * MOST_DECODING, BLOCK, (WINDOW,), seats=2, budget=BUDGET)
    ids = prompt(0, 130)
    if cached:
        cache.add(ids[: cached + 1], max_tokens=1)
        while cache.step():
            pass
    first = cache.add(prompt(1, 28), max_tokens=100)
    while first.num_output_tokens < 1:
        cache.step()
    second = cache.add(ids, max_tokens=100)
    assert cache.manager.cached_prefix(second).tokens == cached
    while cache.step():
        assert len(cache.scheduler.running) <= 1
    assert first.num_output_tokens == second.num_output_tokens == 100
    assert cache.scheduler.preemptions == 0


def test_a_prefix_is_found_by_the_blocks_it_still_sees() -> None:
    cache = ShadowCache(MOST_PREFILLING, BLOCK, (WINDOW,), seats=1, budget=BUDGET)
    ids = prompt(0, 101)
    cache.add(ids, max_tokens=1)
    while cache.step():
        pass
    again = cache.add((*ids, 5), max_tokens=1)
    assert cache.manager.cached_prefix(again).tokens == 100
    shorter = cache.add(ids[:50], max_tokens=1)
    assert cache.manager.cached_prefix(shorter).tokens == 0, "its window was given to others"
    while cache.step():
        pass
    assert again.num_cached_tokens == 100


@pytest.mark.parametrize(
    "windows",
    [
        (24, 0, 24, 24),
        *(
            pytest.param(own, marks=pytest.mark.slow)
            for own in ((0,), (1,), (5,), (24,), (0, 5), (7, 30))
        ),
    ],
)
def test_no_token_ever_misses_what_it_sees_whatever_the_others_do(windows: tuple[int, ...]) -> None:
    """Prompts that share prefixes, callers who leave, tenants who crowd, and hardly any blocks."""
    seen: Counter[str] = Counter()
    for seed in range(12):
        chance = random.Random(seed)
        block_size, seats = chance.choice([1, 3, 4, 16]), chance.randint(1, 6)
        budget, longest = chance.randint(seats, 40), 120
        least = most_blocks(longest, block_size, windows, budget)
        blocks = least + chance.randint(0, 2 * least)
        cache = ShadowCache(blocks, block_size, windows, seats, budget)
        everyone: list[Sequence] = []
        for _ in range(400):
            if chance.random() < 0.4 and len(cache.scheduler.waiting) < 8:
                source, length = chance.choice([0, 0, 1]), chance.randint(1, 100)
                ids = prompt(source, 100)[:length]
                if everyone and chance.random() < 0.3:  # as the next turn of a conversation
                    ids = tuple(chance.choice(everyone).token_ids[:100])
                output = chance.randint(1, longest - len(ids))
                everyone.append(cache.add(ids, output, chance.choice("ab")))
            alive = [s for s in everyone if s.status is not SequenceStatus.FINISHED]
            if alive and chance.random() < 0.03:
                cache.scheduler.finish(chance.choice(alive))
                cache.check_blocks()
            cache.step()
        while cache.step():
            pass
        assert all(sequence.status is SequenceStatus.FINISHED for sequence in everyone)
        assert cache.manager.num_free_blocks == blocks
        assert cache.most_held <= least
        seen["preempted"] += cache.scheduler.preemptions
        seen["hits"] += cache.scheduler.prefix_hit_tokens
    assert seen["preempted"] > 50
    assert seen["hits"] > 1000
