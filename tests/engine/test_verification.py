"""Drafts change nothing but the speed: whatever is asked, the outputs are those without."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nybble.engine import (
    AdapterConfig,
    Engine,
    EngineConfig,
    Request,
    SamplingParams,
    ngram_drafter,
)
from nybble.engine.guide import GrammarCompiler
from nybble.engine.model_drafter import ModelDrafter
from nybble.engine.ngram_drafter import Match, Ngrams
from nybble.loaders import open_checkpoint

CONFIG = EngineConfig(
    dtype=torch.bfloat16,
    block_size=4,
    kv_cache_bytes=1 << 22,
    max_num_seqs=6,
    max_batched_tokens=24,
    max_model_len=160,
    adapters=AdapterConfig(slots=2, max_rank=4),
)
Answer = tuple[list[int], str, list[Any], str | None]


class Informed(Ngrams):
    """Drafts what the sequence will say, of which it knows most: some tokens are wrong."""

    texts: ClassVar[list[tuple[int, ...]]] = []
    chance: ClassVar = random.Random(0)

    def find(self, limit: int) -> Match:
        return Match(self._next(limit), agreeing=4)

    def _next(self, limit: int) -> tuple[int, ...]:
        said = tuple(self._tokens)
        for text in self.texts:
            if text[: len(said)] == said:
                draft = text[len(said) : len(said) + limit]
                return tuple(
                    token if self.chance.random() < 0.8 else (token + 1) % 300 for token in draft
                )
        return tuple(self.chance.randrange(300) for _ in range(limit))


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 250, (length,), generator=generator).tolist())


PATTERN = "([ab]{2,6}-){8}"
# What is asked of each of several requests that run at the same time.
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 5, "temperature": 1.2, "top_p": 0.9},
    "few": {"seed": 6, "top_k": 3, "min_p": 0.1},
    "penalized": {
        "seed": 7,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
    },
    "biased": {"temperature": 0, "logit_bias": {10: 4.0, 11: -90.0}},
    "repeating": {"temperature": 0, "logit_bias": {10: 50.0}},
    "told": {"seed": 8, "logprobs": 3},
    "stopped": {"temperature": 0, "stop": ("e", "o")},
    "late": {"seed": 9, "min_tokens": 20, "ignore_eos": False, "temperature": 2.0},
    "allowed": {"seed": 10, "allowed_token_ids": (50, 51, 52, 53)},
    "guided": {"seed": 11, "temperature": 1.5, "ignore_eos": False},
    "adapted": {"temperature": 0, "adapter": "a"},
}


async def ask(engine: Engine, kind: str, ids: tuple[int, ...], guide: Any) -> Answer:
    options = {"max_tokens": 60, "ignore_eos": True} | ASKED[kind]
    adapter = options.pop("adapter", None)
    request = Request(
        kind,
        ids,
        SamplingParams(**options),
        guide=guide if kind == "guided" else None,
        adapter=adapter,
    )
    tokens: list[int] = []
    text, logprobs, reason = "", [], None
    async for output in engine.generate(request):
        tokens += output.token_ids
        text += output.text
        logprobs += output.logprobs
        reason = output.finish_reason or reason
    return tokens, text, logprobs, reason


def answers(engine: Engine, prompts: dict[str, tuple[int, ...]]) -> dict[str, Answer]:
    compiler = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)

    async def everyone() -> list[Answer]:
        guide = compiler.regex(PATTERN)
        return list(
            await asyncio.gather(*(ask(engine, kind, ids, guide) for kind, ids in prompts.items()))
        )

    return dict(zip(prompts, asyncio.run(everyone()), strict=True))


@pytest.fixture(scope="module", params=["all tokens seen", "windows"])
def models(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
) -> Iterator[Callable[..., Engine]]:
    windows = {"layers": 3, "sliding_window": 24, "full_layers": 1}
    folder = tiny_model(**(windows if request.param == "windows" else {}))
    adapter = tiny_adapter()
    started: list[Engine] = []

    def start(draft: Path | None = None, **settings: Any) -> Engine:
        config = replace(CONFIG, **settings)
        drafting = None if draft is None else open_checkpoint(draft)
        engine = Engine.load(open_checkpoint(folder), config, progress=False, draft=drafting)
        engine.start()
        started.append(engine)
        if request.param == "all tokens seen":
            engine.load_adapter("a", str(adapter))
        return engine

    start.folder = folder  # type: ignore[attr-defined]
    start.adapters = request.param == "all tokens seen"  # type: ignore[attr-defined]
    yield start
    for engine in started:
        engine.stop()


@pytest.mark.parametrize(
    "kv_cache_bytes", [pytest.param(1 << 22, marks=pytest.mark.slow), 150 << 10]
)
def test_whatever_is_asked_the_answers_are_those_without_drafts(
    models: Callable[..., Engine], kv_cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [kind for kind in ASKED if kind != "adapted" or models.adapters]  # type: ignore[attr-defined]
    prompts = {kind: prompt(place, 5 + 6 * place) for place, kind in enumerate(kinds)}
    plain = models(kv_cache_bytes=kv_cache_bytes)
    expected = answers(plain, prompts)
    if kv_cache_bytes < 1 << 20:
        assert plain.stats().preemptions > 0
    monkeypatch.setattr(
        Informed, "texts", [(*prompts[kind], *expected[kind][0]) for kind in prompts]
    )
    monkeypatch.setattr(ngram_drafter, "Ngrams", Informed)
    drafting = models(kv_cache_bytes=kv_cache_bytes, speculate="ngram")
    for _ in range(2):  # the second time with a prefix cache
        assert answers(drafting, prompts) == expected
    stats = drafting.stats()
    assert stats.draft_tokens > stats.accepted_tokens > 300
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert re.fullmatch(PATTERN, expected["guided"][1])
    steps = plain.stats().steps
    assert stats.steps < 2 * steps


def test_a_text_that_repeats_takes_fewer_steps_and_stays_what_it_was(
    models: Callable[..., Engine],
) -> None:
    prompts = {"repeating": prompt(1, 20)}
    found = {}
    for speculate in ("off", "ngram", "auto"):
        engine = models(speculate=speculate)
        answer = answers(engine, prompts)
        found[speculate] = (answer, engine.stats().steps)
    assert found["off"][0] == found["ngram"][0] == found["auto"][0]
    assert found["ngram"][1] < found["off"][1] / 3


def test_drafts_behind_a_cached_prompt_are_not_counted_as_prompt_tokens(
    models: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {"greedy": prompt(4, 33)}
    plain = models()
    expected = answers(plain, prompts)
    monkeypatch.setattr(Informed, "texts", [(*prompts["greedy"], *expected["greedy"][0])])
    monkeypatch.setattr(ngram_drafter, "Ngrams", Informed)
    drafting = models(speculate="ngram")
    for _ in range(2):  # all but the last token of the prompt is cached the second time
        assert answers(drafting, prompts) == expected
    assert drafting.stats().prompt_tokens == 33 + 1


def test_a_draft_never_takes_a_block_or_a_token_of_the_budget_that_another_needs(
    models: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Informed, "texts", [])
    monkeypatch.setattr(ngram_drafter, "Ngrams", Informed)
    prompts = {"greedy": prompt(1, 30), "sampled": prompt(2, 30), "few": prompt(3, 30)}
    plain = models(kv_cache_bytes=100 << 10)
    expected = answers(plain, prompts)
    drafting = models(kv_cache_bytes=100 << 10, speculate="ngram")
    assert answers(drafting, prompts) == expected
    assert drafting.stats().preemptions <= plain.stats().preemptions + 1
    assert drafting.stats().draft_tokens > 0


@pytest.fixture
def draft_model(models: Callable[..., Engine], tmp_path: Path) -> Callable[[float], Path]:
    """``draft_model(noise)``: the model itself, its weights changed by so much of their spread."""

    def make(noise: float) -> Path:
        folder = tmp_path / "draft"
        shutil.copytree(models.folder, folder)  # type: ignore[attr-defined]
        tensors = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            change = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensors[name] = (tensor.float() + noise * change).to(tensor.dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("preempting", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("speculate", [pytest.param("draft", marks=pytest.mark.slow), "auto"])
def test_the_answers_are_those_without_a_draft_model(
    models: Callable[..., Engine],
    draft_model: Callable[[float], Path],
    speculate: str,
    preempting: bool,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = [kind for kind in ASKED if kind != "adapted" or models.adapters]  # type: ignore[attr-defined]
    prompts = {kind: prompt(place, 5 + 6 * place) for place, kind in enumerate(kinds)}
    expected = answers(models(), prompts)
    drafting = models(draft_model(0.03), speculate=speculate)
    if preempting:
        reference.preempt_now_and_then(drafting, monkeypatch, steps=4)
    for _ in range(2):  # the second time with prefix caches
        assert answers(drafting, prompts) == expected
    stats = drafting.stats()
    assert (stats.preemptions > 0) == preempting
    if speculate == "draft":
        assert stats.draft_tokens > stats.accepted_tokens > 100
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert no_drafts_kept(drafting)


def no_drafts_kept(engine: Engine) -> bool:
    speculation = engine._thread._scheduler.speculation
    assert speculation is not None
    drafter = speculation._drafter
    assert isinstance(drafter, ModelDrafter)
    blocks = drafter._blocks
    return not drafter._drafted and blocks.num_free_blocks == blocks.num_blocks


def test_a_model_that_drafts_for_itself_is_always_right(
    models: Callable[..., Engine], draft_model: Callable[[float], Path]
) -> None:
    prompts = {"greedy": prompt(1, 30)}
    plain = models()
    expected = answers(plain, prompts)
    drafting = models(draft_model(0.0), speculate="draft", max_draft_tokens=5)
    assert answers(drafting, prompts) == expected
    stats = drafting.stats()
    assert stats.accepted_tokens == stats.draft_tokens
    assert stats.steps <= 2 + 60 // 6 + 1


class Stubborn(Ngrams):
    """Drafts the same tokens, whatever was said."""

    def find(self, limit: int) -> Match:
        return Match((50, 51)[:limit], agreeing=4)


def test_sampled_tokens_have_the_distribution_of_the_model(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chi-square test of three tokens in a row, for the last two of which there is a draft."""
    folder, ids, allowed, count = tiny_model(), prompt(3, 12), (50, 51, 52), 900
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cells = list(product(allowed, repeat=3))
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *cell[:2]] for cell in cells])).logits[:, -3:]
    chances = (logits[:, :, list(allowed)] / 6).softmax(-1)
    expected = {
        cell: count * float(own[0, cell[0] - 50] * own[1, cell[1] - 50] * own[2, cell[2] - 50])
        for cell, own in zip(cells, chances, strict=True)
    }
    assert min(expected.values()) > 5, "for a chi-square test"
    monkeypatch.setattr(ngram_drafter, "Ngrams", Stubborn)
    config = replace(
        CONFIG, adapters=None, speculate="ngram", max_num_seqs=30, max_batched_tokens=120
    )
    engine = Engine.load(open_checkpoint(folder), replace(config, max_waiting=count), False)
    engine.start()

    async def said(seed: int) -> tuple[int, ...]:
        params = SamplingParams(
            max_tokens=4,
            temperature=6,
            seed=seed,
            allowed_token_ids=allowed,
            ignore_eos=True,
        )
        outputs = engine.generate(Request(f"{seed}", ids, params))
        return tuple([token async for output in outputs for token in output.token_ids])[:3]

    async def everyone() -> list[tuple[int, ...]]:
        return await asyncio.gather(*map(said, range(count)))

    found = Counter(asyncio.run(everyone()))
    stats = engine.stats()
    engine.stop()
    assert count / 4 < stats.accepted_tokens < stats.draft_tokens
    distance = sum((found[cell] - wanted) ** 2 / wanted for cell, wanted in expected.items())
    assert distance < 54.1, "one in a thousand for 26 degrees of freedom"
