"""What the engine tells of a prompt itself equals what transformers computes in one piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nybble.engine import (
    Engine,
    EngineConfig,
    ParameterError,
    PromptLogprobs,
    Request,
    RequestOutput,
    SamplingParams,
)
from nybble.engine import prompt_reader as prompt_reader_module
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.prompt_reader import read_pooling
from nybble.engine.scheduler import Scheduler
from nybble.loaders import CheckpointError
from nybble.models import architecture_of

# Prompts are prefilled in chunks of 16 tokens at most, and about 120 tokens fit into the cache.
CONFIG = EngineConfig(
    dtype=torch.float32,
    block_size=4,
    max_num_seqs=6,
    max_batched_tokens=16,
    max_model_len=64,
)


@pytest.fixture(scope="module", params=["eager", "graphs"])
def engine(
    request: pytest.FixtureRequest, plain_checkpoint: Callable[..., Any], recomputed: type
) -> Iterator[Engine]:
    """As it runs on a CPU, and with what a GPU adds: captured decode steps and deferred text."""
    checkpoint = plain_checkpoint()
    block = KVCacheLayout.of(architecture_of(checkpoint.config), CONFIG, 512).block_bytes
    engine = Engine.load(checkpoint, replace(CONFIG, kv_cache_bytes=30 * block), progress=False)
    if request.param == "graphs":

        def capture(function: Callable[[], Tensor]) -> tuple[Any, Tensor]:
            graph = recomputed(function)
            return graph, graph.out

        engine._runner.capture(capture, progress=False)
        engine._thread._overlap = True
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def model(plain_checkpoint: Callable[..., Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(plain_checkpoint().folder, dtype=torch.float32)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 200, (length,), generator=generator).tolist())


@torch.inference_mode()
def logprobs_of(model: Any, tokens: tuple[int, ...]) -> Tensor:
    """``(n - 1, vocab)``: what every token but the first was chosen from."""
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1].double(), -1)


@torch.inference_mode()
def states_of(model: Any, tokens: tuple[int, ...]) -> Tensor:
    states: Tensor = model.model(torch.tensor([tokens])).last_hidden_state[0]
    return states


def run(engine: Engine, *requests: Request) -> list[list[RequestOutput]]:
    async def one(request: Request) -> list[RequestOutput]:
        return [output async for output in engine.generate(request)]

    async def main() -> list[list[RequestOutput]]:
        return list(await asyncio.gather(*map(one, requests)))

    return asyncio.run(main())


def scoring(name: str, tokens: tuple[int, ...], max_tokens: int = 0, top: int = 3) -> Request:
    params = SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, prompt_logprobs=top
    )
    return Request(name, tokens, params)


def check(found: PromptLogprobs | None, model: Any, tokens: tuple[int, ...]) -> None:
    assert found is not None
    expected = logprobs_of(model, tokens)
    assert found.token_ids == tokens
    own = expected.gather(1, torch.tensor(tokens[1:])[:, None])
    torch.testing.assert_close(
        torch.tensor(found.logprobs).double(), own[:, 0], atol=1e-4, rtol=1e-4
    )
    top = expected.topk(found.top_ids.shape[1])
    torch.testing.assert_close(
        torch.tensor(found.top_logprobs).double(), top.values, atol=1e-4, rtol=1e-4
    )
    at = expected.gather(1, torch.tensor(found.top_ids).long())
    torch.testing.assert_close(at, top.values, atol=1e-4, rtol=1e-4)
    assert found.ranks.tolist() == ((expected > own).sum(-1) + 1).tolist()


@pytest.mark.parametrize("length", [1, 2, 16, 17, 50])
def test_prompt_logprobs_are_transformers_whatever_the_chunks(
    engine: Engine, model: Any, length: int
) -> None:
    tokens = prompt(length, length)
    (outputs,) = run(engine, scoring("a", tokens))
    (output,) = outputs
    assert (output.token_ids, output.text, output.finish_reason) == ((), "", "length")
    assert output.completion_tokens == 0
    check(output.prompt_logprobs, model, tokens)


def test_logits_of_a_long_prompt_are_made_a_few_rows_at_a_time(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = engine.vocab_size
    monkeypatch.setattr(prompt_reader_module, "_MAX_LOGITS_BYTES", 5 * 4 * vocab)
    sizes: list[int] = []
    original = engine._runner.decoder.logits

    def logits(hidden: Tensor, *more: Any) -> Tensor:
        sizes.append(len(hidden))
        return original(hidden, *more)

    monkeypatch.setattr(engine._runner.decoder, "logits", logits)
    tokens = prompt(1, 40)
    ((output,),) = run(engine, scoring("a", tokens))
    check(output.prompt_logprobs, model, tokens)
    assert max(sizes) == 5


def test_no_position_is_missing_where_the_prefix_cache_knows_the_prompt(
    engine: Engine, model: Any
) -> None:
    tokens = prompt(2, 40)
    run(engine, Request("a", tokens, SamplingParams(max_tokens=1)))
    ((output,),) = run(engine, scoring("b", tokens))
    assert output.cached_tokens == 0
    check(output.prompt_logprobs, model, tokens)
    ((cached,),) = run(engine, Request("c", tokens, SamplingParams(max_tokens=1)))
    assert cached.cached_tokens == 36


def test_sequences_that_share_the_batch_and_preempt_change_nothing(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scheduler, "_reserve", lambda *_: 0)  # so that they preempt each other
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=0)
    others = [Request(f"other{i}", prompt(10 + i, 12), params) for i in range(3)]
    alone = [
        [t for o in outputs for t in o.token_ids]
        for (outputs,) in (run(engine, other) for other in others)
    ]
    before = engine.stats().preemptions
    scored = [scoring(f"scored{i}", prompt(20 + i, 30 + i), max_tokens=14 * i) for i in range(3)]
    found = run(engine, *others, *scored)
    assert engine.stats().preemptions > before
    assert [[t for o in outputs for t in o.token_ids] for outputs in found[:3]] == alone
    for request, outputs in zip(scored, found[3:], strict=True):
        check(outputs[0].prompt_logprobs, model, request.prompt_token_ids)
        assert all(output.prompt_logprobs is None for output in outputs[1:])
        assert outputs[-1].completion_tokens == (request.params.max_tokens or 0)


def test_a_prompt_may_fill_the_whole_context_where_nothing_follows(
    engine: Engine, model: Any
) -> None:
    tokens = prompt(3, 64)
    ((output,),) = run(engine, scoring("a", tokens))
    check(output.prompt_logprobs, model, tokens)
    with pytest.raises(ParameterError, match="limited to 64"):
        run(engine, scoring("b", tokens, max_tokens=1))
    with pytest.raises(ParameterError, match="limited to 64"):
        run(engine, scoring("c", prompt(3, 65)))


@pytest.mark.parametrize("length", [1, 16, 17, 50, 64])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_transformers_last_hidden_states(
    engine: Engine, model: Any, pooling: Any, length: int
) -> None:
    tokens = prompt(length, length)
    states = states_of(model, tokens)
    expected = states[-1] if pooling == "last" else states.mean(0)
    expected = expected / expected.norm()
    crowd = [Request(f"o{i}", prompt(i, 9), SamplingParams(max_tokens=12)) for i in range(3)]
    embeds = [Request(f"e{i}", tokens, SamplingParams(), pooling=pooling) for i in range(2)]
    for outputs in run(engine, *crowd, *embeds)[3:]:
        (output,) = outputs
        assert output.embedding is not None
        assert output.token_ids == ()
        torch.testing.assert_close(torch.tensor(output.embedding), expected, atol=1e-4, rtol=1e-4)


def test_only_a_mean_needs_what_the_prefix_cache_holds(engine: Engine) -> None:
    tokens = prompt(40, 24)
    run(engine, Request("a", tokens, SamplingParams(max_tokens=1)))
    for pooling, cached in (("last", 20), ("mean", 0)):
        ((output,),) = run(engine, Request("b", tokens, SamplingParams(), pooling=pooling))  # type: ignore[arg-type]
        assert output.cached_tokens == cached


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (None, "last"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None),
    ],
)
def test_a_checkpoints_own_pooling_is_found(
    tmp_path: Path, config: dict[str, Any] | None, pooling: str | None
) -> None:
    if config is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert read_pooling(tmp_path) == pooling


def test_modules_after_the_transformer_are_computed_or_refused_by_name(tmp_path: Path) -> None:
    """sentence-transformers' list says where pooling is set, and what else makes an embedding."""
    (tmp_path / "2_Pooling").mkdir()
    (tmp_path / "2_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "2_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert read_pooling(tmp_path) == "mean"
    modules.insert(2, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"the module Dense \(2_Dense\) is not supported"):
        read_pooling(tmp_path)


def test_embeddings_of_a_models_own_code_are_not_imitated(tmp_path: Path) -> None:
    """GTE-Qwen attends to later tokens, which only its code says."""
    config = {"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_pooling(tmp_path) == "last"  # a model that generates, whatever its code is
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert read_pooling(tmp_path) is None
