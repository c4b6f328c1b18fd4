"""Layers that keep states of sequences: who holds which slot, and what the prefix cache keeps."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import Engine, EngineConfig, Request, SamplingParams
from nybble.engine.block_manager import BlockManager
from nybble.engine.drafter import Draft, Worth
from nybble.engine.inputs import InputBuffers
from nybble.engine.kv_cache import KVCacheLayout, most_blocks
from nybble.engine.ngram_drafter import NgramDrafter
from nybble.engine.scheduler import ScheduledBatch, Scheduler
from nybble.engine.sequence import Sequence, SequenceStatus
from nybble.engine.state_cache import StateCache, cache_sizes, state_bytes
from nybble.kernels.state_batch import StateBatch
from nybble.loaders import Checkpoint, open_checkpoint
from nybble.models import architecture_of

BLOCK, BUDGET = 4, 16
CONFIG = EngineConfig(
    dtype=torch.float32,
    block_size=BLOCK,
    kv_cache_bytes=1 << 20,
    max_num_seqs=4,
    max_batched_tokens=BUDGET,
)


@pytest.fixture(scope="module")
def build(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Callable[..., Checkpoint]:
    """A random model of a family and with these settings."""
    return lambda *given, **settings: _built(
        tmp_path_factory.mktemp("hybrid"), tiny_model(), *given, **settings
    )


@pytest.fixture(scope="module")
def hybrid(build: Callable[..., Checkpoint]) -> Checkpoint:
    """Two layers with convolutions around one with attention."""
    return build("lfm2", layer_types=["conv", "full_attention", "conv"])


def _built(folder: Path, tokenizer: Path, family: str, **settings: Any) -> Checkpoint:
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        **settings,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return open_checkpoint(folder)


@contextmanager
def running(checkpoint: Checkpoint, **settings: Any) -> Iterator[Engine]:
    engine = Engine.load(checkpoint, replace(CONFIG, **settings), progress=False)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 250, (length,), generator=generator).tolist())


async def generate(
    engine: Engine, prompts: list[tuple[int, ...]], count: int
) -> list[tuple[list[int], int]]:
    """Greedy tokens of prompts that run at the same time, and how many tokens each found cached."""
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)

    async def one(number: int, ids: tuple[int, ...]) -> tuple[list[int], int]:
        tokens, cached = [], 0
        async for output in engine.generate(Request(f"{number}", ids, params)):
            tokens += output.token_ids
            cached = output.cached_tokens
        return tokens, cached

    return list(await asyncio.gather(*(one(*each) for each in enumerate(prompts))))


def tokens(engine: Engine, prompts: list[tuple[int, ...]], count: int) -> list[list[int]]:
    return [found for found, _ in asyncio.run(generate(engine, prompts, count))]


def cached(engine: Engine, ids: tuple[int, ...], count: int = 1) -> int:
    return asyncio.run(generate(engine, [ids], count))[0][1]


def expected(checkpoint: Checkpoint, ids: tuple[int, ...], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    return model.generate(  # type: ignore[no-any-return]
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :].tolist()


def test_a_prompt_is_found_again_up_to_its_last_border(hybrid: Checkpoint) -> None:
    ids = prompt(0, 50)
    with running(hybrid) as engine:
        wanted = expected(hybrid, ids, 20)
        assert tokens(engine, [ids], 20) == [wanted]
        assert cached(engine, ids) == 48
        assert tokens(engine, [ids], 20) == [wanted]
        # Keys and values of what came after are cached too, but no states.
        assert cached(engine, (*ids, *wanted, 7)) == 48
        # Chunks end after 16, 32 and 48 tokens.
        assert cached(engine, ids[:40]) == 32
        stats = engine.stats()
        assert stats.state_slots_held == 0
        assert 0 < stats.state_snapshots <= stats.state_slots_total


def test_a_prompt_is_found_as_far_as_before_if_there_are_no_more_slots_than_sequences(
    hybrid: Checkpoint,
) -> None:
    """Sent again, it reads a snapshot at its last border, and takes none that could replace it."""
    ids = prompt(0, 50)
    slots = 4 * state_bytes(architecture_of(hybrid.config), torch.float32)
    with running(hybrid, kv_cache_bytes=8 * slots) as engine:
        assert engine.stats().state_slots_total == engine.max_num_seqs == 4
        assert [cached(engine, ids) for _ in range(5)] == [0, 48, 48, 48, 48]
        # All at once they still find it, each as far as its slots allow.
        found = asyncio.run(generate(engine, [ids] * 8, 12))
        assert [each for each, _ in found] == [expected(hybrid, ids, 12)] * 8
        assert [cached(engine, ids) for _ in range(3)][1:] == [48, 48]


def test_a_beginning_that_prompts_share_is_found_from_the_third_of_them_on(
    hybrid: Checkpoint,
) -> None:
    shared = prompt(1, 26)
    prompts = [(*shared, *prompt(seed, 20)) for seed in (2, 3, 4)]
    with running(hybrid) as engine:
        found = [asyncio.run(generate(engine, [ids], 12))[0] for ids in prompts]
        # The first left states after 16, 32 and 44 tokens. The second computes the rest of what
        # they share, and keeps the states after its last border.
        assert [cached for _, cached in found] == [0, 16, 24]
        assert [each for each, _ in found] == [expected(hybrid, ids, 12) for ids in prompts]


def test_without_a_prefix_cache_there_is_a_slot_for_each_sequence_and_no_snapshot(
    hybrid: Checkpoint,
) -> None:
    ids = prompt(0, 50)
    with running(hybrid, prefix_caching=False) as engine:
        assert tokens(engine, [ids] * 5, 12) == [expected(hybrid, ids, 12)] * 5
        assert cached(engine, ids) == 0
        assert engine.stats().state_slots_total == 4
        assert engine.stats().state_snapshots == 0


def test_sequences_that_preempt_each_other_give_the_tokens_of_transformers(
    hybrid: Checkpoint,
) -> None:
    prompts = [prompt(seed, 40) for seed in range(4)]
    wanted = [expected(hybrid, ids, 60) for ids in prompts]
    architecture = architecture_of(hybrid.config)
    layout = KVCacheLayout.of(architecture, CONFIG, 512)
    nbytes = 4 * state_bytes(architecture, torch.float32) + 2 * layout.sequence_bytes(110)
    with running(hybrid, kv_cache_bytes=nbytes) as engine:
        assert tokens(engine, prompts, 60) == wanted
        assert engine.stats().preemptions > 0
        assert engine.stats().state_slots_held == 0


def test_state_spaces_go_on_from_their_snapshots_and_after_preemption(
    build: Callable[..., Checkpoint],
) -> None:
    spaces = build(
        "granitemoehybrid",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_local_experts=0,
        shared_intermediate_size=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
    )
    prompts = [prompt(seed, 40) for seed in range(4)]
    wanted = [expected(spaces, ids, 60) for ids in prompts]
    architecture = architecture_of(spaces.config)
    states = state_bytes(architecture, torch.float32)
    assert states == 2 * 4 * (3 * (128 + 2 * 16) + 8 * 16 * 16), "convolution and matrices"
    # Half of it is for four slots; the other has less than the 100 tokens of each of four.
    assert 4 * states < 400 * KVCacheLayout.of(architecture, CONFIG, 512).block_bytes // BLOCK
    with running(spaces, kv_cache_bytes=8 * states) as engine:
        assert tokens(engine, prompts, 60) == wanted
        assert engine.stats().preemptions > 0
        assert engine.stats().state_slots_held == 0
    with running(spaces, kv_cache_bytes=1 << 22) as engine:
        assert [tokens(engine, [ids], 60) for ids in prompts] == [[each] for each in wanted]
        assert [cached(engine, ids) for ids in prompts] == [36] * 4
        assert tokens(engine, prompts, 60) == wanted


def test_fewer_sequences_run_at_once_if_states_take_more_than_half_of_the_memory(
    hybrid: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    each = state_bytes(architecture_of(hybrid.config), torch.float32)
    assert each == 2 * 2 * 64 * 4, "two layers, two rows, float32"
    prompts = [prompt(seed, 10) for seed in range(4)]
    with running(hybrid, kv_cache_bytes=36 * each) as engine:
        assert engine.stats().state_slots_total == 4
        blocks = engine.stats().kv_blocks_total
        assert (
            blocks
            == 32
            * each
            // KVCacheLayout.of(architecture_of(hybrid.config), CONFIG, 512).block_bytes
        )
    with running(hybrid, kv_cache_bytes=5 * each) as engine:
        assert "room for the states of 2 sequences" in caplog.text
        assert engine.max_num_seqs == engine.stats().state_slots_total == 2
        found = tokens(engine, [ids[:1] for ids in prompts], 3)
        assert found == [expected(hybrid, ids[:1], 3) for ids in prompts]
    with pytest.raises(ValueError, match=f"states of one sequence, which take {each} bytes"):
        Engine.load(hybrid, replace(CONFIG, kv_cache_bytes=2 * each - 1), progress=False)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    "delta nets": (
        "qwen3_5_text",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "state spaces": (
        "granitemoehybrid",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
        },
    ),
}


class Oracle(NgramDrafter):
    """Knows what follows, and is wrong from some place on.

    texts: of each prompt, all tokens.
    """

    def __init__(self, texts: Mapping[tuple[int, ...], Several[int]]) -> None:
        super().__init__()
        self._texts, self._chance = texts, random.Random(3)

    def draft(self, limits: Mapping[Sequence, int], worth: Worth) -> dict[Sequence, Draft]:
        found = {}
        for sequence, limit in limits.items():
            text = self._texts[tuple(sequence.token_ids[: sequence.num_prompt_tokens])]
            first = len(sequence.token_ids)
            tokens = list(text[first : first + self._chance.randint(0, limit)])
            if tokens and self._chance.random() < 0.7:
                place = self._chance.randrange(len(tokens))
                tokens[place] = 3 + (tokens[place] + 1) % 200
            if tokens:
                found[sequence] = Draft(tuple(tokens), (0,) * len(tokens))
        return found


@pytest.mark.parametrize(
    ("kind", "preempting"),
    [
        ("convolutions", True),
        ("delta nets", False),
        ("state spaces", False),
        pytest.param("delta nets", True, marks=pytest.mark.slow),
        pytest.param("state spaces", True, marks=pytest.mark.slow),
    ],
)
def test_a_draft_that_is_wrong_leaves_the_states_as_they_were(
    build: Callable[..., Checkpoint],
    reference: Any,
    kind: str,
    preempting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafts of every length, of which every number of tokens is right, change no answer.

    Of four sequences at a time, while others' prompts are read in chunks; twice, the second time
    with the prefix cache, which has snapshots of what was right alone.
    """
    family, settings = KINDS[kind]
    checkpoint = build(family, **settings)
    prompts = [prompt(seed, length) for seed, length in enumerate((5, 30, 9, 47))]
    config = {"kv_cache_bytes": 1 << 22, "dtype": torch.bfloat16}
    with running(checkpoint, **config) as plain:
        wanted = tokens(plain, prompts, 24)
    texts = {ids: [*ids, *said] for ids, said in zip(prompts, wanted, strict=True)}
    monkeypatch.setattr("nybble.engine.engine.NgramDrafter", lambda: Oracle(texts))
    with running(checkpoint, speculate="ngram", max_draft_tokens=5, **config) as engine:
        if preempting:
            reference.preempt_now_and_then(engine, monkeypatch, steps=3)
        for _ in range(2):
            assert tokens(engine, prompts, 24) == wanted
        stats = engine.stats()
        assert stats.draft_tokens > stats.accepted_tokens > 30
        assert (stats.preemptions > 0) == preempting
        states = engine._thread._scheduler.block_manager.states
        assert states is not None
        assert states.num_held == 0
        assert len(states._free) + states.num_snapshots == states.num_slots


def test_a_draft_has_no_more_tokens_than_there_are_slots() -> None:
    states = StateCache(4, 2, BLOCK)
    first, second = states.begin(None), states.begin(None)
    assert states.verify(first, 5) == 2
    assert states.verify(second, 5) == 0
    between = list(first.between)
    states.computed(first, None, accepted=1)
    assert first.slot == between[1], "the states after the first token and one of its draft"
    assert states.verify(second, 5) == 2
    states.release(second)
    states.release(first)
    assert sorted(states._free) == [0, 1, 2, 3]


def test_a_step_that_ran_out_of_memory_is_computed_from_the_states_before_it(
    hybrid: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt(seed, 20 + seed) for seed in range(3)]
    with running(hybrid) as engine:
        compute, steps = engine._runner.run, [0]

        def run(batch: ScheduledBatch) -> torch.Tensor:
            logits = compute(batch)  # the states have changed by now
            steps[0] += 1
            if steps[0] in (2, 9):
                raise torch.OutOfMemoryError("for the test")
            return logits

        monkeypatch.setattr(engine._runner, "run", run)

        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)

        async def one(number: int) -> list[int]:
            request = Request(f"{number}", prompts[number], params)
            return [t async for out in engine.generate(request) for t in out.token_ids]

        async def everyone() -> list[Any]:
            return await asyncio.gather(*map(one, range(3)), return_exceptions=True)

        found = asyncio.run(everyone())
        finished = [index for index, each in enumerate(found) if isinstance(each, list)]
        assert len(finished) == 1, "two were given up"
        for index in finished:
            assert found[index] == expected(hybrid, prompts[index], 16)
        assert engine.stats().state_slots_held == 0


def test_decoding_from_graphs_gives_the_same_tokens(hybrid: Checkpoint, recomputed: Any) -> None:
    prompts = [prompt(seed, 20) for seed in range(3)]
    wanted = [expected(hybrid, ids, 24) for ids in prompts]
    with running(hybrid) as engine:
        made: list[Any] = []

        def capture(function: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
            made.append(recomputed(function))
            return made[-1], made[-1].out

        engine._runner.capture(capture, progress=False)
        assert tokens(engine, prompts, 24) == wanted
        assert sum(graph.replays for graph in made) > 10


class ShadowStates:
    """A scheduler's steps without a model: each slot keeps what its states follow from, the tokens
    from the start of the sequence on, and every slot that a sequence reads is looked at."""

    def __init__(self, blocks: int, block_size: int, slots: int, seats: int, budget: int) -> None:
        self.states = StateCache(slots, seats, block_size)
        self.manager = BlockManager(blocks, block_size, states=self.states)
        self.scheduler = Scheduler(self.manager, seats, budget)
        self.slots: list[int | None] = [None] * slots
        self.inputs = InputBuffers(
            max_seqs=seats,
            max_tokens=budget,
            max_blocks=-(-400 // block_size),
            block_size=block_size,
            group_of_layer=range(1),
            device=torch.device("cpu"),
            states=True,
        )
        self.snapshots = 0

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
        states = self.inputs.build(batch).states
        assert states is not None
        self._compute(batch, states)
        for item in batch:
            sequence = item.sequence
            self.scheduler.computed(item)
            if item.completes:
                sequence.token_ids.append(len(sequence.token_ids) % 7)
                if sequence.num_output_tokens == sequence.max_tokens:
                    self.scheduler.finish(sequence)
        self.check()
        return True

    def _compute(self, batch: ScheduledBatch, states: StateBatch) -> None:
        fields = (states.read, states.write, states.snapshot, states.snapshot_rows)
        rows = list(zip(batch, *(field.tolist() for field in fields), strict=True))
        written: Counter[int] = Counter()
        for item, read, write, snapshot, count in rows:
            prefixes = _prefixes(item.sequence.token_ids)
            assert (read == -1) == (item.start == 0)
            if read >= 0:
                assert self.slots[read] == prefixes[item.start]
                others = [row for row in rows if row[0] is not item]
                assert not any(read in (row[2], row[3]) for row in others)
            written.update(slot for slot in (write, snapshot) if slot >= 0)
            if snapshot >= 0:
                assert 1 <= count <= item.num_tokens
                assert (item.start + count) % self.manager.block_size == 0
                self.snapshots += 1
        assert all(times == 1 for times in written.values())
        for item, _, write, snapshot, count in rows:
            prefixes = _prefixes(item.sequence.token_ids)
            self.slots[write] = prefixes[item.start + item.num_tokens]
            if snapshot >= 0:
                self.slots[snapshot] = prefixes[item.start + count]

    def check(self) -> None:
        """Every slot is free, or held by a running sequence, or a snapshot of a cached block."""
        held = [s.state.slot for s in self.scheduler.running if s.state is not None]
        assert len(set(held)) == len(held) == len(self.scheduler.running) == self.states.num_held
        free, kept = self.states._free, list(self.states._slot_of.values())
        assert sorted([*held, *free, *kept]) == list(range(self.states.num_slots))
        assert not self.states._readers
        assert all((0, key) in self.manager._block_of for key in self.states._slot_of)


def _prefixes(tokens: list[int]) -> list[int]:
    """Of every length, beginning with none."""
    found, prefix = [0], 0
    for token in tokens:
        prefix = hash((prefix, token))
        found.append(prefix)
    return found


@pytest.mark.parametrize(
    "spare", [1, *(pytest.param(spare, marks=pytest.mark.slow) for spare in (0, 3, 20))]
)
def test_no_sequence_ever_reads_states_that_are_not_its_own_prefix(spare: int) -> None:
    """Prompts that share prefixes, callers who leave, tenants who crowd, and hardly any slots."""
    seen: Counter[str] = Counter()
    for seed in range(12):
        chance = random.Random(seed)
        block_size, seats = chance.choice([1, 3, 4, 16]), chance.randint(1, 6)
        budget, longest = chance.randint(seats, 40), 120
        least = most_blocks(longest, block_size, (0,), budget)
        blocks = least + chance.randint(0, 2 * least)
        shadow = ShadowStates(blocks, block_size, seats + spare, seats, budget)
        everyone: list[Sequence] = []
        for _ in range(400):
            if chance.random() < 0.4 and len(shadow.scheduler.waiting) < 8:
                source, length = chance.choice([0, 0, 1]), chance.randint(1, 100)
                ids = prompt(source, 100)[:length]
                if everyone and chance.random() < 0.3:  # as the next turn of a conversation
                    ids = tuple(chance.choice(everyone).token_ids[:100])
                output = chance.randint(1, longest - len(ids))
                everyone.append(shadow.add(ids, output, chance.choice("ab")))
            alive = [s for s in everyone if s.status is not SequenceStatus.FINISHED]
            if alive and chance.random() < 0.03:
                shadow.scheduler.finish(chance.choice(alive))
            if shadow.scheduler.running and chance.random() < 0.02:
                shadow.scheduler.preempt(chance.choice(shadow.scheduler.running))
            shadow.step()
        while shadow.step():
            pass
        assert all(sequence.status is SequenceStatus.FINISHED for sequence in everyone)
        assert shadow.manager.num_free_blocks == blocks
        assert shadow.states.num_held == 0
        seen["preempted"] += shadow.scheduler.preemptions
        seen["hits"] += shadow.scheduler.prefix_hit_tokens
        seen["snapshots"] += shadow.snapshots
    assert seen["preempted"] > 50
    assert seen["hits"] > 500
    assert seen["snapshots"] > 100


def test_what_the_cache_is_split_into_takes_no_more_than_it_has(hybrid: Checkpoint) -> None:
    architecture = architecture_of(hybrid.config)
    layout = KVCacheLayout.of(architecture, CONFIG, 512)
    each = state_bytes(architecture, CONFIG.dtype)
    for nbytes in range(8 * each, 400 * each, 1000):
        blocks, slots = cache_sizes(architecture, CONFIG, layout, 512, nbytes)
        used = blocks * layout.block_bytes + slots * each
        assert nbytes - layout.block_bytes < used <= nbytes
        assert slots >= 4
        assert slots * each <= max(nbytes / 8, 4 * each)
