"""EAGLE-3 heads draft what their paper says, and change nothing but the speed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, rms_norm, silu
from transformers import AutoModelForCausalLM

from nybble import LLM
from nybble.engine import (
    AdapterConfig,
    Engine,
    EngineConfig,
    SamplingParams,
    memory,
)
from nybble.engine.draft_model import check_rounding
from nybble.engine.guide import GrammarCompiler
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.memory import memory_explained
from nybble.engine.scheduler import ScheduledBatch
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.footprint import weight_bytes
from nybble.models import UnsupportedModelError, architecture_of

from .heads import complete, drafter_of, prompt, recorded

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, EPS = 4, 2, 32, 128, 1e-5
# Inputs of the layers of a model of two: its embeddings, between them, and what the last computes.
CAPTURED = [0, 1, 2]
CONFIG = EngineConfig(
    dtype=torch.bfloat16,
    block_size=4,
    kv_cache_bytes=1 << 22,
    max_num_seqs=6,
    max_batched_tokens=24,
    max_model_len=160,
    max_draft_tokens=4,
    adapters=AdapterConfig(slots=2, max_rank=4),
)


class Reference:
    """A head in plain PyTorch, without a cache: it computes all positions anew for every token.

    tensors: as checkpoints have them. embedding: ``(vocab, hidden)``, the target's.
    """

    def __init__(self, tensors: Mapping[str, Tensor], embedding: Tensor, normed: bool) -> None:
        self.tensors, self.embedding, self.normed = tensors, embedding, normed
        self.ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]

    def layer(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """``hidden (n, hidden)`` of each position, and the tokens after them; what comes of it."""

        def norm(x: Tensor, name: str) -> Tensor:
            return rms_norm(x, (HIDDEN,), self.tensors[f"midlayer.{name}.weight"], EPS)

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ self.tensors[f"midlayer.{name}.weight"].T

        def heads(x: Tensor) -> Tensor:
            return x.view(len(x), -1, HEAD_DIM).transpose(0, 1)

        def rotated(x: Tensor) -> Tensor:
            half = HEAD_DIM // 2
            speeds = 10000.0 ** (-torch.arange(half) / half)
            angles = torch.arange(x.shape[1])[:, None] * speeds
            cos, sin = angles.cos(), angles.sin()
            a, b = x[..., :half], x[..., half:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        normed = norm(hidden, "hidden_norm")
        x = torch.cat([norm(self.embedding[tokens], "input_layernorm"), normed], dim=-1)
        q, k, v = (heads(linear(x, f"self_attn.{name}_proj")) for name in "qkv")
        shared = HEADS // KV_HEADS
        k, v = rotated(k).repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        scores = rotated(q) @ k.transpose(1, 2) / HEAD_DIM**0.5
        later = torch.ones(len(x), len(x)).triu(1).bool()
        attended = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        attended = linear(attended.transpose(0, 1).flatten(1), "self_attn.o_proj")
        residual = (normed if self.normed else hidden) + attended
        x = norm(residual, "post_attention_layernorm")
        gated = silu(linear(x, "mlp.gate_proj")) * linear(x, "mlp.up_proj")
        return residual + linear(gated, "mlp.down_proj")

    def logits(self, hidden: Tensor) -> Tensor:
        normed = rms_norm(hidden, (HIDDEN,), self.tensors["norm.weight"], EPS)
        return normed @ self.tensors["lm_head.weight"].T

    def draft(self, captured: Tensor, tokens: list[int], count: int) -> list[int]:
        """What follows ``tokens``, of which all but the last have hidden states."""
        hidden, after, found = captured @ self.tensors["fc.weight"].T, tokens[1:], []
        for _ in range(count):
            last = self.layer(hidden, torch.tensor(after))[-1:]
            found.append(int(self.ids[self.logits(last).argmax()]))
            hidden, after = torch.cat([hidden, last]), [*after, found[-1]]
        return found


def captured_of(folder: Path, tokens: list[int]) -> Tensor:
    """What transformers computes at the places that the head reads: ``(tokens, 3 · hidden)``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before_norm: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(
        lambda module, given: before_norm.append(given[0])
    )
    with torch.no_grad():
        states = model.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    hook.remove()
    return torch.cat([states[0][0], states[1][0], before_norm[0][0]], dim=-1)


def train(head: Path, target: Path, texts: list[list[int]], steps: int = 120) -> None:
    """Teach a head what follows in ``texts``, two tokens ahead (training-time test)."""
    stored = load_file(head / "model.safetensors")
    learnt = [name for name in stored if name.endswith("weight")]
    tensors = {name: stored[name].float().requires_grad_(name in learnt) for name in learnt}
    tensors["d2t"] = stored["d2t"]
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"].float()
    reference = Reference(tensors, embedding, normed=False)
    place = torch.full((len(embedding),), -100)
    place[reference.ids] = torch.arange(len(reference.ids))
    known = [(captured_of(target, text), torch.tensor(text)) for text in texts]
    optimizer = torch.optim.Adam([tensors[name] for name in learnt], lr=3e-3)
    for _ in range(steps):
        loss = torch.zeros(())
        for captured, text in known:
            hidden = captured[:-2] @ tensors["fc.weight"].T
            out = reference.layer(hidden, text[1:-1])
            loss = loss + cross_entropy(reference.logits(out), place[text[2:]])
            # Of the position before, what it has computed itself stands for what is not known.
            own = torch.cat([hidden[:1], out[:-1]])
            loss = loss + cross_entropy(
                reference.logits(reference.layer(own, text[1:-1])), place[text[2:]]
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    stored |= {name: tensors[name].detach().contiguous() for name in learnt}
    save_file(stored, head / "model.safetensors", {"format": "pt"})


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """``start(target, head, **settings)``: an engine; without a head it does not draft."""
    started: list[Engine] = []

    def start(target: Path, head: Path | None = None, **settings: Any) -> Engine:
        settings.setdefault("speculate", "off" if head is None else "draft")
        engine = Engine.load(
            open_checkpoint(target),
            replace(CONFIG, **settings),
            progress=False,
            draft=None if head is None else open_checkpoint(head),
        )
        engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.stop()


@pytest.fixture(scope="module")
def target(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def trained(
    tiny_eagle3: Callable[..., Path], target: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A head that has learnt what the target says greedily after some prompts."""
    engine = Engine.load(open_checkpoint(target), CONFIG, progress=False)
    engine.start()

    async def texts() -> list[list[int]]:
        prompts = [prompt(seed, 12 + 7 * seed) for seed in range(4)]
        answers = await asyncio.gather(
            *(complete(engine, str(place), ids) for place, ids in enumerate(prompts))
        )
        return [[*ids, *answer] for ids, answer in zip(prompts, answers, strict=True)]

    said = asyncio.run(texts())
    engine.stop()
    head = tiny_eagle3(tmp_path_factory.mktemp("eagle3") / "head", target, vocab=300)
    train(head, target, said)
    return head


@pytest.mark.parametrize("normed", [False, True])
def test_drafts_are_those_of_the_reference(
    tiny_eagle3: Callable[..., Path],
    target: Path,
    start: Callable[..., Engine],
    tmp_path: Path,
    normed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a prompt read in chunks, at every step of two answers at the same time."""
    head = tiny_eagle3(tmp_path / "head", target, norm_before_residual=normed)
    engine = start(target, head, dtype=torch.float32, adapters=None)
    drafts = recorded(engine, monkeypatch)

    async def both() -> list[list[int]]:
        return await asyncio.gather(
            complete(engine, "a", prompt(1, 50), max_tokens=12),
            complete(engine, "b", prompt(2, 7), max_tokens=12),
        )

    answers = asyncio.run(both())
    tensors = load_file(head / "model.safetensors")
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"].float()
    reference = Reference(tensors, embedding, normed)
    texts = [[*prompt(1, 50), *answers[0]], [*prompt(2, 7), *answers[1]]]
    captured = [captured_of(target, text) for text in texts]
    compared = 0
    for tokens, draft in drafts:
        (place,) = [n for n, text in enumerate(texts) if text[: len(tokens)] == tokens]
        expected = reference.draft(captured[place][: len(tokens) - 1], tokens, len(draft.tokens))
        assert list(draft.tokens) == expected
        compared += len(draft.tokens)
    assert compared > 50


@pytest.mark.slow
def test_a_head_that_was_trained_is_often_right(
    target: Path, trained: Path, start: Callable[..., Engine]
) -> None:
    expected = asyncio.run(complete(start(target), "a", prompt(2, 26)))
    engine = start(target, trained)
    assert asyncio.run(complete(engine, "a", prompt(2, 26))) == expected
    stats = engine.stats()
    assert engine.draft_method == "eagle3"
    assert stats.accepted_tokens > stats.draft_tokens / 3
    assert stats.steps < 30, "without drafts there are 41"


PATTERN = "([ab]{2,6}-){6}"
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "learnt": {},
    "sampled": {"seed": 5, "temperature": 1.2, "top_p": 0.9},
    "penalized": {"seed": 7, "temperature": 1.0, "repetition_penalty": 1.3},
    "guided": {"seed": 11, "temperature": 1.5, "ignore_eos": False},
    "adapted": {"adapter": "a"},
}


async def everyone(engine: Engine, kinds: list[str]) -> list[list[int]]:
    compiler = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    return await asyncio.gather(
        *(
            complete(
                engine,
                kind,
                prompt(2, 26) if kind == "learnt" else prompt(20 + place, 5 + 8 * place),
                guide=compiler.regex(PATTERN) if kind == "guided" else None,
                **ASKED[kind],
            )
            for place, kind in enumerate(kinds)
        )
    )


@pytest.mark.parametrize("speculate", ["draft", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("preempting", [pytest.param(False, marks=pytest.mark.slow), True])
def test_whatever_is_asked_the_answers_are_those_without_a_head(
    target: Path,
    trained: Path,
    start: Callable[..., Engine],
    tiny_adapter: Callable[..., Path],
    speculate: str,
    preempting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, drafting = start(target), start(target, trained, speculate=speculate)
    for engine in (plain, drafting):
        engine.load_adapter("a", str(tiny_adapter()))
    expected = asyncio.run(everyone(plain, list(ASKED)))
    scheduler = drafting._thread._scheduler
    schedule, steps = scheduler.schedule, 0

    def preempt_now_and_then() -> ScheduledBatch:
        nonlocal steps
        steps += 1
        if preempting and steps % 4 == 0 and scheduler.running:
            scheduler.preempt(scheduler.running[steps // 4 % len(scheduler.running)])
        return schedule()

    monkeypatch.setattr(scheduler, "schedule", preempt_now_and_then)
    for _ in range(2):  # the second time with prefix caches
        assert asyncio.run(everyone(drafting, list(ASKED))) == expected
    stats = drafting.stats()
    assert (stats.preemptions > 0) == preempting
    if speculate == "draft":
        assert stats.draft_tokens > stats.accepted_tokens > 30
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert not drafter_of(drafting)._last


@pytest.mark.parametrize("settings", [{"kv_dtype": "int8"}, {"max_draft_tokens": 1}])
def test_other_settings_change_no_answer_either(
    target: Path, trained: Path, start: Callable[..., Engine], settings: dict[str, Any]
) -> None:
    expected = asyncio.run(everyone(start(target, **settings), ["greedy", "learnt", "sampled"]))
    drafting = start(target, trained, **settings)
    assert asyncio.run(everyone(drafting, ["greedy", "learnt", "sampled"])) == expected
    assert drafting.stats().draft_tokens > 10


def test_layers_of_4_bits_are_computed_in_calls_between_what_the_head_reads(
    target: Path, trained: Path
) -> None:
    texts = ["def add(first, second):", "the quick brown fox"]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    answers = []
    for head in (None, trained):
        model = LLM(
            target,
            quantize="nf4",
            draft_model=head,
            device="cpu",
            kv_cache_bytes=1 << 22,
            speculate=None if head is None else "draft",
            progress=False,
        )
        answers.append([answer.token_ids for answer in model.generate(texts, params)])
        if head is not None:
            assert model._engine.stats().draft_tokens > 20
        model.close()
    assert answers[0] == answers[1]


def test_layers_with_windows_and_a_head_that_sees_all(
    tiny_eagle3: Callable[..., Path],
    tiny_model: Callable[..., Path],
    start: Callable[..., Engine],
    tmp_path: Path,
) -> None:
    target = tiny_model(layers=3, sliding_window=24, full_layers=1)
    head = tiny_eagle3(tmp_path / "head", target)
    kinds = [kind for kind in ASKED if kind != "adapted"]
    expected = asyncio.run(everyone(start(target, adapters=None), kinds))
    for nbytes in (1 << 22, 80 << 10):
        drafting = start(target, head, adapters=None, kv_cache_bytes=nbytes)
        assert asyncio.run(everyone(drafting, kinds)) == expected
        stats = drafting.stats()
        assert stats.draft_tokens > 50
        assert stats.kv_blocks_free == stats.kv_blocks_total
    assert stats.preemptions > 0


def test_a_prefix_from_the_cache_was_read_by_the_head_too(
    tiny_eagle3: Callable[..., Path],
    target: Path,
    start: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its hidden states are nowhere, and the drafts are those of a prompt that is read."""
    engine = start(
        target, tiny_eagle3(tmp_path / "head", target), dtype=torch.float32, adapters=None
    )
    drafts = recorded(engine, monkeypatch)
    asyncio.run(complete(engine, "a", prompt(1, 50)))
    read = list(drafts)
    drafts.clear()
    hits = engine.stats().prefix_hit_tokens
    asyncio.run(complete(engine, "b", prompt(1, 50)))
    assert engine.stats().prefix_hit_tokens - hits == 48
    assert drafts == read


def test_memory_that_runs_out_costs_drafts_alone(
    target: Path, trained: Path, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = asyncio.run(complete(start(target), "a", prompt(2, 26)))
    engine = start(target, trained)
    head = drafter_of(engine)._head
    forward, calls = head.forward, 0

    def failing(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise torch.OutOfMemoryError
        return forward(*given)

    monkeypatch.setattr(head, "forward", failing)
    assert asyncio.run(complete(engine, "a", prompt(2, 26))) == expected
    assert engine.stats().failures == 0
    assert engine.stats().accepted_tokens > 0


def test_an_engine_that_begins_again_reads_anew(
    target: Path, trained: Path, start: Callable[..., Engine]
) -> None:
    engine = start(target, trained, restarts=1)
    expected = asyncio.run(complete(engine, "a", prompt(2, 26)))
    before, first = drafter_of(engine), engine.stats().accepted_tokens

    def fail() -> None:
        raise RuntimeError("for a test")

    engine._thread._inbox.put(fail)
    while engine._thread.stats.restarts == 0 or not engine.healthy:
        pass
    assert drafter_of(engine) is not before
    assert asyncio.run(complete(engine, "a", prompt(2, 26))) == expected
    assert engine.stats().accepted_tokens == 2 * first


def test_its_keys_and_values_take_a_part_of_the_cache(
    tiny_eagle3: Callable[..., Path], target: Path, start: Callable[..., Engine], tmp_path: Path
) -> None:
    head = tiny_eagle3(tmp_path / "head", target)
    alone = start(target, kv_cache_bytes=300 << 10).stats().kv_blocks_total
    both = start(target, head, kv_cache_bytes=300 << 10).stats().kv_blocks_total
    assert both == pytest.approx(alone * 2 / 3, abs=1), "a layer of three, of the same size"


def test_what_it_takes_is_known_before_it_is_loaded(
    tiny_eagle3: Callable[..., Path], target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = tiny_eagle3(tmp_path / "head", target)
    tensors = load_file(head / "model.safetensors")
    numbers = sum(each.numel() for name, each in tensors.items() if name != "t2d")
    assert weight_bytes(head, torch.bfloat16) == 2 * numbers
    config = replace(CONFIG, speculate="draft", kv_cache_bytes=1 << 40)
    model, draft = open_checkpoint(target), open_checkpoint(head)
    layout = KVCacheLayout.of(architecture_of(model.config), config, 160)
    # As much as six sequences can fill: of two layers, and of the head's.
    most = 6 * layout.table_blocks(160) * layout.block_bytes * 3 // 2
    monkeypatch.setattr(memory, "available_bytes", lambda device: most)
    with memory_explained(model, config, draft):
        pass
    monkeypatch.setattr(memory, "available_bytes", lambda device: most - 1)
    with (
        pytest.raises(ValueError, match=r"the KV cache of .* does not fit"),
        memory_explained(model, config, draft),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_hidden_size": 96}, "hidden states of 96 entries, and the model's have 128"),
        ({"vocab_size": 400}, "a vocabulary of 400 tokens, and the model has 3"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "the layers 1, 2, 9 of a model that has"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "the layers 2, 1, -1 of a model that has 2"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}},
            "the layers 1, 2, 3 of a model that has 2",
        ),
        ({"eagle_aux_hidden_state_layer_ids": "all"}, "is 'all', expected numbers of layers"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is false"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"architectures": ["LlamaForCausalLMEagle"]}, "LlamaForCausalLMEagle heads are not"),
    ],
)
def test_a_head_of_another_model_or_kind_is_refused(
    tiny_eagle3: Callable[..., Path],
    target: Path,
    start: Callable[..., Engine],
    tmp_path: Path,
    settings: dict[str, Any],
    message: str,
) -> None:
    head = tiny_eagle3(tmp_path / "head", target, **settings)
    with pytest.raises(UnsupportedModelError, match=message):
        start(target, head)


def test_a_head_by_itself_is_no_model(
    tiny_eagle3: Callable[..., Path], target: Path, start: Callable[..., Engine], tmp_path: Path
) -> None:
    head = tiny_eagle3(tmp_path / "head", target)
    with pytest.raises(UnsupportedModelError, match="head is an EAGLE-3 head, which drafts for"):
        start(head)


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_refused(
    tiny_eagle3: Callable[..., Path], target: Path, start: Callable[..., Engine], tmp_path: Path
) -> None:
    head = tiny_eagle3(tmp_path / "head", target)
    stored = load_file(head / "model.safetensors")

    def having(**changes: Tensor | None) -> None:
        tensors = {name: each for name, each in (stored | changes).items() if each is not None}
        save_file(tensors, head / "model.safetensors", {"format": "pt"})

    for changes, message in (
        ({"fc.weight": None}, "has no tensor fc.weight, which EAGLE-3 heads have"),
        ({"d2t": None}, "has no tensor d2t, which an EAGLE-3 head has that drafts 200 of 3"),
        ({"fc.bias": torch.zeros(HIDDEN)}, "fc.bias, which EAGLE-3 heads do not have"),
        ({"norm.weight": torch.ones(5)}, r"norm.weight has shape \(5,\), expected \(128,\)"),
    ):
        having(**changes)
        with pytest.raises(CheckpointError, match=message):
            start(target, head)
    having(d2t=stored["d2t"] + 200)
    with pytest.raises(ValueError, match=r"d2t leads to token .*, expected less than 3"):
        start(target, head)


def test_a_checkpoint_may_name_its_layer_as_models_do_and_bring_an_embedding(
    tiny_eagle3: Callable[..., Path],
    target: Path,
    start: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, other = tiny_eagle3(tmp_path / "head", target), tmp_path / "other"
    other.mkdir()
    stored = load_file(head / "model.safetensors")
    renamed = {name.replace("midlayer.", "model.layers.0."): each for name, each in stored.items()}
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    renamed["model.embed_tokens.weight"] = embedding
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    # The EAGLE repository's own heads have the name of a whole model in their configs.
    config = json.loads((head / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (other / "config.json").write_text(json.dumps(config))
    found = []
    for folder in (head, other):
        engine = start(target, folder)
        drafts = recorded(engine, monkeypatch)
        asyncio.run(complete(engine, "a", prompt(1, 20), max_tokens=10))
        found.append(drafts)
    assert found[0] == found[1] != []


def test_a_head_is_not_rounded(
    tiny_eagle3: Callable[..., Path], target: Path, tmp_path: Path
) -> None:
    head = open_checkpoint(tiny_eagle3(tmp_path / "head", target))
    with pytest.raises(ValueError, match=r"draft_quantize is 'nf4', but .* is an EAGLE-3 head"):
        check_rounding(head, "nf4")
    check_rounding(head, None)
    check_rounding(open_checkpoint(target), "nf4")
