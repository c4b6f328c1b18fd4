"""A draft model: which ones are refused, what it does when it cannot draft, and when it pays."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.engine import Engine, EngineConfig, Request, SamplingParams
from nybble.engine.drafter import Draft
from nybble.engine.model_drafter import ModelDrafter
from nybble.engine.speculation import Acceptance, Speculation, StepCosts, draft_lengths
from nybble.loaders import open_checkpoint

CONFIG = EngineConfig(
    block_size=4,
    kv_cache_bytes=1 << 22,
    max_num_seqs=4,
    max_batched_tokens=24,
    max_model_len=160,
    max_draft_tokens=4,
    speculate="draft",
)


@pytest.fixture
def start(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    """``start(draft, **settings)``: an engine of the tiny model with this draft model."""
    started: list[Engine] = []

    def start(draft: Path | None, **settings: Any) -> Engine:
        drafting = None if draft is None else open_checkpoint(draft)
        config = replace(CONFIG, **settings)
        engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False, draft=drafting)
        engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.stop()


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 250, (length,), generator=generator).tolist())


async def complete(engine: Engine, name: str, ids: tuple[int, ...], tokens: int) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return [
        token
        async for output in engine.generate(Request(name, ids, params))
        for token in output.token_ids
    ]


def drafter_of(engine: Engine) -> ModelDrafter:
    speculation = engine._thread._scheduler.speculation
    assert speculation is not None
    assert isinstance(speculation._drafter, ModelDrafter)
    return speculation._drafter


def changed(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a model's folder with another config."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(settings | config))
    return to


def test_a_model_with_another_tokenizer_is_refused_with_a_token_that_differs(
    start: Callable[..., Engine], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = changed(tiny_model(seed=1), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"the draft model other has another vocabulary: token \d"):
        start(other)


def test_models_that_cannot_be_taken_back_and_settings_that_do_not_go_together_are_refused(
    start: Callable[..., Engine], tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r"the draft model .* lfm2 model, .* cannot be taken back"):
        start(tiny_model(family="lfm2", layers=3))
    draft = tiny_model(seed=1)
    with pytest.raises(ValueError, match="speculate is 'ngram', expected 'draft' or 'auto'"):
        start(draft, speculate="ngram")
    with pytest.raises(ValueError, match="is 'draft', which needs a draft_model"):
        start(None)
    with pytest.raises(ValueError, match="holds no block of 4 tokens"):
        start(draft, kv_cache_bytes=3 << 10)


def test_both_caches_hold_as_many_tokens_in_the_memory_of_one(
    start: Callable[..., Engine], tiny_model: Callable[..., Path]
) -> None:
    draft = start(tiny_model(seed=1, layers=1), kv_cache_bytes=300 << 10)
    blocks, drafts = draft.stats().kv_blocks_total, drafter_of(draft)._blocks.num_blocks
    assert abs(blocks - drafts) <= 1
    alone = start(None, speculate="off", kv_cache_bytes=300 << 10).stats().kv_blocks_total
    assert blocks == pytest.approx(alone * 2 / 3, abs=1)


def test_sequences_that_are_cancelled_leave_no_blocks_behind(
    start: Callable[..., Engine], tiny_model: Callable[..., Path]
) -> None:
    engine = start(tiny_model(seed=1))

    async def cancelled() -> None:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        stream = engine.generate(Request("gone", prompt(1, 20), params))
        async for output in stream:
            if output.completion_tokens >= 8:
                break
        assert drafter_of(engine)._drafted
        await stream.aclose()
        await complete(engine, "next", prompt(2, 5), 4)

    asyncio.run(cancelled())
    blocks = drafter_of(engine)._blocks
    assert blocks.num_free_blocks == blocks.num_blocks
    assert not drafter_of(engine)._drafted


def test_a_sequence_longer_than_the_draft_model_reads_goes_on_without_drafts(
    start: Callable[..., Engine], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    short = changed(tiny_model(), tmp_path / "short", max_position_embeddings=40)
    expected = asyncio.run(complete(start(None, speculate="off"), "a", prompt(1, 20), 60))
    engine = start(short)
    assert asyncio.run(complete(engine, "a", prompt(1, 20), 60)) == expected
    # It drafts up to its forty tokens and the one after them.
    assert 0 < engine.stats().accepted_tokens <= 41 - 20
    assert asyncio.run(complete(engine, "b", prompt(2, 50), 20))


def test_tokens_that_only_a_padded_vocabulary_has_are_not_given_to_the_draft_model(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder, draft = tiny_model(), tiny_model(seed=1)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    padded = changed(folder, tmp_path / "padded", vocab_size=vocab + 8)
    tensors = load_file(padded / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, padded / "model.safetensors", {"format": "pt"})
    engine = Engine.load(
        open_checkpoint(padded), CONFIG, progress=False, draft=open_checkpoint(draft)
    )
    engine.start()
    try:
        ids = (*prompt(1, 10), vocab + 3, 7)
        assert len(asyncio.run(complete(engine, "a", ids, 10))) == 10
        assert engine.stats().draft_tokens == 0
    finally:
        engine.stop()


def test_memory_that_runs_out_while_drafting_costs_the_drafts_alone(
    start: Callable[..., Engine], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = asyncio.run(complete(start(None, speculate="off"), "a", prompt(1, 20), 30))
    engine = start(tiny_model())
    runner = drafter_of(engine)._runner
    run, calls = runner.run, 0

    def failing(batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise torch.OutOfMemoryError
        return run(batch)

    monkeypatch.setattr(runner, "run", failing)
    assert asyncio.run(complete(engine, "a", prompt(1, 20), 30)) == expected
    stats = engine.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 5, "what was drafted before it is right"
    assert stats.failures == 0


def test_an_engine_that_begins_again_drafts_from_an_empty_cache(
    start: Callable[..., Engine], tiny_model: Callable[..., Path]
) -> None:
    engine = start(tiny_model(), restarts=1)
    expected = asyncio.run(complete(engine, "a", prompt(1, 20), 20))
    before, first = drafter_of(engine), engine.stats().accepted_tokens

    def fail() -> None:
        raise RuntimeError("for a test")

    engine._thread._inbox.put(fail)
    while engine._thread.stats.restarts == 0 or not engine.healthy:
        pass
    assert drafter_of(engine) is not before
    assert asyncio.run(complete(engine, "a", prompt(1, 20), 20)) == expected
    assert engine.stats().accepted_tokens == 2 * first


class Recorder:
    """Stands in for a draft model: what it was asked for, and drafts of one grade.

    prompt: seconds that it takes to read a prompt, which it has not read yet.
    """

    method = "draft"
    first_guess = (0.2, 0.5, 0.9)

    def __init__(self, pass_seconds: float, prompt: float = 0.0) -> None:
        self.costs = StepCosts()
        self.costs.observe(1, pass_seconds)
        self.asked: list[list[int]] = []
        self._prompt = prompt

    def reading(self, sequence: Any) -> float:
        return self._prompt

    def draft(self, limits: Any, worth: Any) -> dict[Any, Draft]:
        self.asked.append(list(limits.values()))
        self._prompt = 0.0
        return {each: Draft((1,) * count, (1,) * count) for each, count in limits.items()}

    def see(self, batch: Any) -> None: ...

    def release(self, sequence: Any) -> None: ...


class Decoding:
    """Stands in for a sequence that decodes."""

    num_output_tokens = 1

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.request = type("Request", (), {"guide": None})()


def proposals(drafter: Recorder, steps: int, right: bool, room: int = 9) -> Speculation:
    """A loop of steps of 10 ms, of which another row takes a tenth."""
    decides, sequence = Speculation(drafter, 4, adaptive=True), Decoding()
    decides._costs.observe(1, 0.010)
    decides._costs.observe(5, 0.014)
    for _ in range(steps):
        for draft, length in decides.propose(1, 1, {sequence: room}, 99).values():  # type: ignore[dict-item]
            tokens = [1] * length + [1] if right else [2]
            decides.observe_tokens(draft, length, tokens, sequence.acceptance)
        decides.observe(1, 0.010 + decides._drafting)
    return decides


def test_a_draft_model_that_is_right_and_fast_drafts_all_it_may() -> None:
    drafter = Recorder(pass_seconds=0.001)
    proposals(drafter, 50, right=True)
    assert drafter.asked[-1] == [4]


def test_one_that_is_wrong_stops_but_for_half_a_hundredth_of_the_time() -> None:
    drafter = Recorder(pass_seconds=0.001)
    proposals(drafter, 1000, right=False)
    assert drafter.asked[-1] == [1], "a trial"
    learnt = next(n for n, asked in enumerate(drafter.asked) if asked == [1])
    # A trial takes a tenth of a step: one in twenty steps may have one.
    assert len(drafter.asked) - learnt == pytest.approx(50, rel=0.2)
    slow = Recorder(pass_seconds=0.010)
    proposals(slow, 1000, right=False)
    assert len(slow.asked) < 40


def test_a_prompt_is_read_if_the_rest_of_the_sequence_is_worth_it() -> None:
    # Of a draft of two .6 + .36 tokens are expected, so that 1.96 take 10 + 2 + 2 ms: a token saves
    # 2.9 ms, and a hundred of them 0.29 s.
    for room, seconds, worth in ((100, 0.1, True), (100, 0.4, False), (9, 0.1, False)):
        drafter = Recorder(pass_seconds=0.001, prompt=seconds)
        proposals(drafter, 5, right=True, room=room)
        assert len(drafter.asked) == (5 if worth else 0)
    # The end of an answer is not known: no more than usual is expected of one that may be endless.
    endless = Recorder(pass_seconds=0.001, prompt=10.0)
    proposals(endless, 5, right=True, room=10**6)
    assert not endless.asked


def test_what_a_prompt_takes_is_not_what_a_draft_takes(
    start: Callable[..., Engine], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt longer than a pass, the first pass drafts nothing and takes very long."""
    engine = start(tiny_model(), speculate="auto", max_batched_tokens=24)
    drafter, now = drafter_of(engine), 0.0
    run = drafter._runner.run

    def taking(batch: Any) -> torch.Tensor:
        nonlocal now
        now += 0.001 * sum(item.num_tokens for item in batch)
        return run(batch)

    monkeypatch.setattr(drafter._runner, "run", taking)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    target = engine._runner.run

    def slow(batch: Any) -> torch.Tensor:
        nonlocal now
        now += 0.010
        return target(batch)

    monkeypatch.setattr(engine._runner, "run", slow)
    asyncio.run(complete(engine, "a", prompt(1, 60), 40))
    assert drafter.costs.of(1) == pytest.approx(0.001)
    assert drafter._seconds_per_token == pytest.approx(0.001)
    # Drafts are right and cost a tenth: from the first on, all but the first three steps have some.
    assert engine.stats().accepted_tokens > 25


def test_one_as_slow_as_the_model_itself_never_pays() -> None:
    drafter = Recorder(pass_seconds=0.010)
    proposals(drafter, 300, right=True)
    assert max(asked[0] for asked in drafter.asked) == 1
    assert len(drafter.asked) < 10


def test_passes_count_as_much_as_they_take() -> None:
    steps = StepCosts()
    steps.observe(1, 0.010)
    steps.observe(9, 0.010)
    passes = StepCosts()
    passes.observe(1, 0.005)
    # A token more with a chance of .8 takes half a step: 1 / 10, 1.8 / 15, 2.44 / 20, 2.95 / 25.
    assert draft_lengths(steps, 1, 1, [[0.8, 0.64, 0.512]], 99, passes) == [2]
    assert draft_lengths(steps, 1, 1, [[0.4, 0.16, 0.064]], 99, passes) == [0]
    # One pass serves both: 3.1 / 15 is more than 2 / 10.
    assert draft_lengths(steps, 2, 2, [[0.5], [0.6]], 99, passes) == [1, 1]
