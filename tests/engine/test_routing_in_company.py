"""A mixture's token gets the same experts, with the same weights, whatever shares its step."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import Engine, EngineConfig, Request, SamplingParams
from nybble.loaders import open_checkpoint

from ..tiny import write_tokenizer

WIDTH = 2048  # sums long enough for their order to show


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    vocab = write_tokenizer(folder, vocab_size=320, max_length=512)
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=vocab,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=64,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_log_probabilities_are_bit_for_bit_those_alone(folder: Path) -> None:
    config = EngineConfig(kv_cache_bytes=1 << 24, max_num_seqs=8, max_batched_tokens=64)
    engine = Engine.load(open_checkpoint(folder), config, progress=False)
    engine.start()
    generator = torch.Generator().manual_seed(1)
    prompts = [
        tuple(torch.randint(3, 300, (n,), generator=generator).tolist()) for n in range(3, 19, 2)
    ]
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=2, ignore_eos=True)

    async def ask(name: str, ids: tuple[int, ...]) -> list[object]:
        outputs = engine.generate(Request(name, ids, params))
        return [logprob async for output in outputs for logprob in output.logprobs]

    async def together() -> list[list[object]]:
        asked = (ask(f"together {n}", ids) for n, ids in enumerate(prompts))
        return list(await asyncio.gather(*asked))

    try:
        alone = [asyncio.run(ask(f"alone {n}", ids)) for n, ids in enumerate(prompts)]
        assert asyncio.run(together()) == alone
    finally:
        engine.stop()
