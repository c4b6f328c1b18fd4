"""Latent attention (DeepSeek): what is cached, what adapters change, what 16 bits and FP8 give."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import AdapterConfig, EngineConfig
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.parallel import TensorParallel
from nybble.kernels.latent import per_head
from nybble.kernels.reference import latent_store
from nybble.loaders import Checkpoint, open_checkpoint
from nybble.loaders.footprint import weight_bytes
from nybble.models import UnsupportedModelError, architecture_of
from nybble.quantizers import quantize_checkpoint

LATENT, ROTATED, LAYERS = 32, 16, 3
FP8_BLOCK = 16


@pytest.fixture(scope="module")
def deepseek(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Checkpoint:
    """V3's parts, small: one dense layer, then mixtures in groups."""
    folder = tmp_path_factory.mktemp("latent") / "deepseek_v3"
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=32,
        qk_rope_head_dim=ROTATED,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        max_position_embeddings=512,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model() / name, folder / name)
    return open_checkpoint(folder)


def test_a_token_takes_one_latent_and_one_rotated_key_in_a_layer(deepseek: Checkpoint) -> None:
    config = EngineConfig(dtype=torch.bfloat16, block_size=16)
    layout = KVCacheLayout.of(architecture_of(deepseek.config), config, 512)
    assert layout.block_bytes == 16 * LAYERS * (LATENT + ROTATED) * 2
    eighth = KVCacheLayout.of(
        architecture_of(deepseek.config), replace(config, kv_dtype="int8"), 512
    )
    assert eighth.block_bytes == 16 * LAYERS * (LATENT + ROTATED + 4)


def test_sequences_that_preempt_each_other_give_the_tokens_of_transformers(
    reference: Any, deepseek: Checkpoint
) -> None:
    """Their prompts come in chunks, and a part of each is found in the prefix cache again."""
    greedy = reference.greedy(reference.transformers_model(deepseek), (40, 50, 60), 48)
    prompts, expected = map(list, zip(*greedy, strict=True))
    token = LAYERS * (LATENT + ROTATED) * 4
    engine = reference.start(deepseek, kv_cache_bytes=token * 160)
    try:
        assert reference.together(engine, prompts, 48) == expected
        assert engine.stats().preemptions > 0
        assert [reference.alone(engine, ids, 48) for ids in prompts] == expected
    finally:
        engine.stop()


def test_in_16_bits_a_request_says_in_company_what_it_says_alone(
    reference: Any, deepseek: Checkpoint
) -> None:
    """Rows are computed alike by whichever kernels this machine has."""
    for kv_dtype in ("auto", "int8"):
        engine = reference.start(deepseek, dtype=torch.bfloat16, kv_dtype=kv_dtype)
        try:
            prompts = [list(range(40, 40 + length)) for length in (3, 17, 70)]
            alone = [reference.alone(engine, ids, 24) for ids in prompts]
            assert reference.together(engine, prompts, 24) == alone
        finally:
            engine.stop()


def test_16_bits_change_the_logits_little(reference: Any, deepseek: Checkpoint) -> None:
    """In bfloat16 the attention is a C++ kernel, if there is one; in float32 it is not."""
    ids = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(1))
    exact = reference.our_logits(deepseek, ids, torch.float32)
    rounded = reference.our_logits(deepseek, ids, torch.bfloat16)
    difference = (rounded - exact).norm() / exact.norm()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(deepseek.folder, dtype=torch.bfloat16)
        theirs = theirs(ids[None]).logits[0].float()
    assert difference < 1.5 * (theirs - exact).norm() / exact.norm()


@pytest.mark.parametrize("format", [pytest.param("bf16", marks=pytest.mark.slow), "gptq"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"target_modules": ["kv_b_proj"]}, marks=pytest.mark.slow),
        {"target_modules": ["kv_b_proj"], "use_dora": True},
        pytest.param({"target_modules": ["kv_b_proj"], "lora_bias": True}, marks=pytest.mark.slow),
        {
            "target_modules": [
                *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
            ],
        },
    ],
    ids=["kv_b_proj", "dora", "bias", "all of attention"],
)
def test_adapters_of_several_users_say_what_peft_says(
    reference: Any, deepseek: Checkpoint, tmp_path: Path, kind: dict[str, Any], format: str
) -> None:
    """What an adapter adds to kv_b_proj is never computed as keys and values either."""
    if format != "bf16":
        quantize_checkpoint(
            deepseek.folder, tmp_path / "q", format="gptq", group_size=32, progress=False
        )
        deepseek = open_checkpoint(tmp_path / "q")
    expected = []
    (plain,) = reference.greedy(reference.transformers_model(deepseek), (40,), 16)
    for seed in range(2):
        torch.manual_seed(seed)
        base = reference.transformers_model(deepseek)
        adapted = get_peft_model(base, LoraConfig(r=4 + 2 * seed, lora_alpha=8, **kind))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
            elif "magnitude" in name:
                parameter.data *= 0.5 + torch.rand(parameter.shape)
        adapted.save_pretrained(tmp_path / f"adapter-{seed}")
        expected += reference.greedy(adapted.eval(), (40,), 16)
    engine = reference.start(deepseek, adapters=AdapterConfig(slots=2, max_rank=8))
    try:
        for seed, each in enumerate(expected):
            engine.load_adapter(f"{seed}", str(tmp_path / f"adapter-{seed}"))
            assert reference.alone(engine, each.prompt, 16, adapter=f"{seed}") == each.tokens

        async def together() -> list[list[int]]:
            return await asyncio.gather(
                reference.collect(engine, "base", plain.prompt, max_tokens=16),
                *(
                    reference.collect(
                        engine, f"{seed}", each.prompt, max_tokens=16, adapter=f"{seed}"
                    )
                    for seed, each in enumerate(expected)
                ),
            )

        assert asyncio.run(together()) == [plain.tokens, *(each.tokens for each in expected)]
    finally:
        engine.stop()
    assert expected[0].tokens != expected[1].tokens


def test_fp8_checkpoints_by_block_are_read_as_they_are_published(
    reference: Any, deepseek: Checkpoint, tmp_path: Path
) -> None:
    """Experts are separate tensors, and so are those of a layer that predicts further tokens."""
    tensors = load_file(deepseek.folder / "model.safetensors")
    exact = {}
    for name in [name for name in tensors if name.endswith("_proj.weight") or "experts" in name]:
        weight = tensors.pop(name).float()
        parts = {name: weight}
        if weight.ndim == 3:  # stacked here
            module, leaf = name.rsplit(".", 1)
            leaves = ("gate_proj", "up_proj") if leaf.startswith("gate_up") else ("down_proj",)
            parts = {
                f"{module}.{number}.{leaf}.weight": part
                for number, expert in enumerate(weight)
                for leaf, part in zip(leaves, expert.chunk(len(leaves)), strict=True)
            }
        for part, matrix in parts.items():
            rows, columns = (-(-length // FP8_BLOCK) for length in matrix.shape)
            padded = torch.zeros(rows * FP8_BLOCK, columns * FP8_BLOCK)
            padded[: matrix.shape[0], : matrix.shape[1]] = matrix
            blocks = padded.view(rows, FP8_BLOCK, columns, FP8_BLOCK)
            scale = blocks.abs().amax((1, 3)).clamp(min=1e-9) / 448
            each = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            each = each[: matrix.shape[0], : matrix.shape[1]]
            stored = (matrix / each).to(torch.float8_e4m3fn)
            exact[part] = (stored.float() * each).bfloat16()
            tensors[part], tensors[part + "_scale_inv"] = stored, scale
    further = {
        name.replace("layers.1.", f"layers.{LAYERS}."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    for folder, weights in (
        ("fp8", tensors | further),
        ("exact", {k: v for k, v in tensors.items() if "scale_inv" not in k} | exact),
    ):
        shutil.copytree(deepseek.folder, tmp_path / folder)
        save_file(weights, tmp_path / folder / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    ids = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(1))
    found, expected = (
        reference.our_logits(open_checkpoint(tmp_path / folder), ids, torch.float32)
        for folder in ("fp8", "exact")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_dequantized_when_it_is_loaded_is_counted_in_16_bits(
    deepseek: Checkpoint, tmp_path: Path
) -> None:
    quantize_checkpoint(
        deepseek.folder, tmp_path / "nf4", format="nf4", group_size=32, progress=False
    )
    linears = architecture_of(deepseek.config).computed_in_16_bits
    assert [name.rpartition(".")[2] for name in linears] == ["kv_b_proj"] * LAYERS
    entries = sum(linear.out * linear.inputs for linear in linears.values())
    plain = ("norm.weight", "embed_tokens.weight", "lm_head.weight")
    entries += sum(
        tensor.numel()
        for name, tensor in load_file(tmp_path / "nf4" / "model.safetensors").items()
        if name.endswith(plain)
    )
    two, four = (weight_bytes(tmp_path / "nf4", each) for each in (torch.bfloat16, torch.float32))
    assert four - two == 2 * entries


def test_several_ranks_are_refused_by_name(deepseek: Checkpoint) -> None:
    with pytest.raises(UnsupportedModelError, match="deepseek_v3 models have latent attention"):
        TensorParallel(0, 2).check(architecture_of(deepseek.config))


def test_heads_are_computed_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 3, 8, generator=generator), torch.randn(3, 8, 4, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        heads, matrices = x.to(dtype), weight.to(dtype)
        found = per_head(heads, matrices)
        expected = torch.stack([heads[:, h] @ matrices[h] for h in range(3)], 1)
        torch.testing.assert_close(found, expected)


def test_latents_are_stored_where_they_are_told_to() -> None:
    cache, latents = torch.zeros(3, 1, 4, 8), torch.arange(18.0).view(3, 6)
    angle, key = torch.zeros(3, 2), torch.arange(1.0, 7).view(3, 2)
    q, slots = torch.zeros(3, 1, 2), torch.tensor([9, -1, 2])
    latent_store(q, key, latents, angle.cos(), angle.sin(), cache, slots)
    assert torch.equal(cache[2, 0, 1], torch.cat((key[0], latents[0])))
    assert torch.equal(cache[0, 0, 2], torch.cat((key[2], latents[2])))
    assert cache.count_nonzero() == 15
