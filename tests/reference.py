"""What transformers computes on the same weights, and what our decoder and engine compute."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nybble.engine import Engine, EngineConfig, Request, SamplingParams
from nybble.engine.decoder import Decoder
from nybble.engine.scheduler import ScheduledBatch
from nybble.kernels import PackedWeight
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.state_batch import StateBatch
from nybble.loaders import Checkpoint
from nybble.models import Architecture, Mixture, architecture_of


def transformers_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Transformers' own model in float32, holding the checkpoint's dequantized weights."""
    config = AutoConfig.from_pretrained(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    members = dict(architecture_of(checkpoint.config).fused.values())
    parameters = _by_our_names(model, architecture_of(checkpoint.config))
    with torch.no_grad():
        for name, weight in checkpoint.weights():
            if isinstance(weight, Tensor):
                parameters[name].copy_(weight)
                continue
            dense = weight.dequantize() if isinstance(weight, PackedWeight) else weight.weight
            names = members.get(name, (name,))
            sizes = [parameters[part + ".weight"].shape[0] for part in names]
            for part, rows in zip(names, dense.split(sizes), strict=True):  # type: ignore[no-untyped-call]
                parameters[part + ".weight"].copy_(rows)
            if weight.bias is not None:
                for part, rows in zip(names, weight.bias.split(sizes), strict=True):  # type: ignore[no-untyped-call]
                    parameters[part + ".bias"].copy_(rows)
    return model.eval()


def _by_our_names(model: PreTrainedModel, architecture: Architecture) -> dict[str, Tensor]:
    """The model's parameters and buffers, with a view for each tensor of experts it stacks."""
    found: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for index, layer in enumerate(architecture.layers):
        if not isinstance(layer.mlp, Mixture):
            continue
        ours = architecture.module(index, "")
        names = model.get_submodule(ours.rstrip(".")).named_children()
        (block,) = [name for name, child in names if hasattr(child, "experts")]
        theirs = f"{ours}{block}."
        for alias, name in layer.mlp.router.aliases.items():
            if ours + alias in found:
                found[ours + name] = found[ours + alias]
        experts = model.get_submodule(f"{theirs}experts")
        parameters = {name.rpartition(".")[2]: p.data for name, p in experts.named_parameters()}
        for stacked in layer.mlp.stacked:
            whole, shares = parameters.get(stacked.name.rpartition(".")[2]), len(stacked.holds)
            for number in range(len(layer.mlp.experts) if whole is not None else 0):
                entry = whole[number].mT if stacked.transposed else whole[number]
                for share, name in enumerate(stacked.holds):
                    turns = entry[share::shares]
                    found[ours + name.format(number)] = (
                        turns if stacked.interleaved else entry.chunk(shares)[share]
                    )
    return found


def our_logits(checkpoint: Checkpoint, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``(tokens, vocab)`` of one prompt computed in one step."""
    tokens = len(ids)
    decoder = Decoder(
        architecture_of(checkpoint.config),
        checkpoint.weights(),
        device=torch.device("cpu"),
        dtype=dtype,
        max_model_len=tokens,
    )
    blocks = -(-tokens // 16)
    caches = [
        tuple(
            torch.zeros(blocks, attention.kv_heads, 16, attention.head_dim, dtype=dtype)
            for _ in range(attention.cache_tensors)
        )
        for attention in decoder.architecture.attentions
    ]
    batch = AttentionBatch(
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        context_lens=torch.tensor([tokens], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        slot_mapping=torch.arange(tokens),
        max_query=tokens,
    )
    states = [
        tuple(
            torch.zeros(1, *state.shape, dtype=torch.float32 if state.wide else dtype)
            for state in mixer.states
        )
        for mixer in decoder.architecture.recurrents
    ]
    slot, none = torch.tensor([0], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    state_batch = (
        StateBatch(batch.query_start, none, slot, none, slot + 1, tokens) if states else None
    )
    inputs = ids, torch.arange(tokens), caches, [batch] * len(caches), None
    with torch.inference_mode():
        return decoder.logits(decoder.forward(*inputs, states, state_batch))


def assert_same_logits(checkpoint: Checkpoint) -> None:
    ids = torch.randint(0, 250, (100,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = transformers_model(checkpoint)(ids[None]).logits[0]
    error = (our_logits(checkpoint, ids, torch.float32) - expected).abs().max()
    assert error < 1e-4 * expected.abs().max()


class Greedy(NamedTuple):
    prompt: list[int]
    tokens: list[int]


def greedy(model: PreTrainedModel, lengths: Sequence[int], count: int) -> list[Greedy]:
    """Random prompts of these lengths, each with ``count`` greedy tokens of ``model``.

    A prompt after which two tokens ever come within 1e-3 of the largest logit is passed over: there
    the order in which a processor adds would choose. Both are float32 and agree to 1e-4.
    """
    found = []
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        for _ in range(100):
            ids = torch.randint(3, 250, (1, length), generator=generator)
            answer = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            first, second = torch.cat(answer.logits).topk(2, dim=-1).values.unbind(-1)
            if (first - second > 1e-3 * first.abs()).all():
                break
        else:
            raise AssertionError(f"no prompt of {length} tokens has an answer without near ties")
        found.append(Greedy(ids[0].tolist(), answer.sequences[0, length:].tolist()))
    return found


def start(checkpoint: Checkpoint, **settings: Any) -> Engine:
    """An engine in float32, whose steps are shorter than most prompts here."""
    config = EngineConfig(
        dtype=torch.float32, kv_cache_bytes=1 << 22, max_num_seqs=8, max_batched_tokens=32
    )
    engine = Engine.load(checkpoint, replace(config, **settings), progress=False)
    engine.start()
    return engine


def preempt_now_and_then(engine: Engine, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """From now on before every ``steps``-th step one of the running sequences is preempted."""
    scheduler = engine._thread._scheduler
    schedule, turns = scheduler.schedule, itertools.count(1)

    def preempting() -> ScheduledBatch:
        turn, rest = divmod(next(turns), steps)
        if rest == 0 and scheduler.running:
            scheduler.preempt(scheduler.running[turn % len(scheduler.running)])
        return schedule()

    monkeypatch.setattr(scheduler, "schedule", preempting)


async def collect(engine: Engine, name: str, ids: Sequence[int], **options: Any) -> list[int]:
    """Greedy tokens of one request; ``options`` are Request's and SamplingParams'."""
    adapter = options.pop("adapter", None)
    params = SamplingParams(**{"temperature": 0, "ignore_eos": True, **options})
    request = Request(name, tuple(ids), params, adapter=adapter)
    return [token async for output in engine.generate(request) for token in output.token_ids]


def alone(engine: Engine, ids: Sequence[int], count: int, **options: Any) -> list[int]:
    """Greedy tokens of a request by itself."""
    return asyncio.run(collect(engine, "alone", ids, max_tokens=count, **options))


def together(engine: Engine, requests: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy tokens of requests that run at the same time."""

    async def run() -> list[list[int]]:
        each = (
            collect(engine, f"{index}", ids, max_tokens=count) for index, ids in enumerate(requests)
        )
        return await asyncio.gather(*each)

    return asyncio.run(run())
