"""Quantizing a mixture of experts: each expert is calibrated on the tokens that reach it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.loaders import open_checkpoint
from nybble.quantizers import InFlight, quantize_checkpoint
from nybble.quantizers.layers import DecoderLayers

CPU = torch.device("cpu")
EXPERTS, HIDDEN, LAYERS = 4, 64, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A Qwen3-MoE in which no token of the texts reaches expert 3 of layer 0."""
    folder = tmp_path_factory.mktemp("mixture") / "qwen3_moe"
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=300,
        hidden_size=HIDDEN,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
        first = model.model.layers[0]
        # Of inputs whose entries are near 1, the last expert's logit is far below the others'.
        model.model.embed_tokens.weight.add_(1)
        router = first.mlp.gate.weight
        router.sub_(router.mean(1, keepdim=True))
        router[3] = -1
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model() / name, folder / name)
    return folder


def texts() -> torch.Tensor:
    return torch.randint(3, 300, (6, 40), generator=torch.Generator().manual_seed(0))


def test_statistics_of_an_expert_are_those_of_its_tokens(folder: Path) -> None:
    blocks = DecoderLayers(folder, CPU, 40)
    hidden = blocks.embed(texts())
    block = blocks.load(0)
    inputs: dict[int, list[torch.Tensor]] = {expert: [] for expert in range(EXPERTS)}
    experts = block.get_submodule("mlp.experts")

    def keep(module: Any, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        x, ids, _ = args
        for expert in inputs:
            # The first token of a text is left out below.
            counted = (torch.arange(len(x)) % 40 >= 1) & (ids == expert).any(1)
            inputs[expert].append(x[counted])

    handle = experts.register_forward_pre_hook(keep)
    blocks.outputs(block, hidden)
    handle.remove()
    names = [f"mlp.experts.{expert}.gate_proj" for expert in range(EXPERTS)]
    found = blocks.statistics(block, hidden, names, first=1)
    for expert, name in enumerate(names):
        x = torch.cat(inputs[expert])
        assert found[name].tokens == len(x)
        if len(x):
            torch.testing.assert_close(found[name].second_moment, x.T @ x / len(x))
            torch.testing.assert_close(found[name].mean_abs, x.abs().mean(0))
    assert found[names[0]].tokens > 0
    assert found[names[3]].tokens == 0
    assert torch.equal(found[names[3]].second_moment, torch.eye(HIDDEN))


def test_shared_experts_are_calibrated_though_they_run_after_the_others(
    tmp_path: Path,
) -> None:
    config = AutoConfig.for_model(
        "glm4_moe",
        vocab_size=300,
        hidden_size=HIDDEN,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=0,
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    blocks = DecoderLayers(tmp_path, CPU, 40)
    hidden, block = blocks.embed(texts()), blocks.load(0)
    names = [group.linears[0].name for group in blocks.groups(0)]
    found = blocks.statistics(block, hidden, names)
    shared = {name: found[name].tokens for name in names if "shared" in name}
    assert list(shared.values()) == [240, 240]


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_experts_that_saw_too_few_tokens_are_named(
    reference: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, format: str
) -> None:
    with caplog.at_level(logging.WARNING):
        errors = quantize_checkpoint(
            folder,
            tmp_path / format,
            format=format,
            group_size=32,
            calibration=texts(),
            progress=False,
        )
    (warning,) = [r.getMessage() for r in caplog.records if "calibration tokens" in r.getMessage()]
    assert "model.layers.0.mlp.experts.3 (0)" in warning
    assert "model.layers.0.mlp.experts.0 (" not in warning
    tokens = {error.name: error.tokens for error in errors}
    assert tokens["model.layers.0.mlp.experts.3.down_proj"] == 0
    assert tokens["model.layers.0.self_attn.q_proj"] == 6 * 40 - (6 if format == "awq" else 0)
    reference.assert_same_logits(open_checkpoint(tmp_path / format))


def test_routers_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(folder, tmp_path / "q", format="nf4", group_size=32, progress=False)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "q"))
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(before[name], after[name])


def test_a_mixture_is_rounded_as_it_is_read(reference: Any, folder: Path) -> None:
    reference.assert_same_logits(InFlight(open_checkpoint(folder), layers="nf4"))


def test_the_grouped_kernel_stays_within_the_rounding_of_bfloat16(
    reference: Any, folder: Path, tmp_path: Path
) -> None:
    """Compared with float32 arithmetic on the same weights, no worse than 1.5 × transformers'."""
    quantize_checkpoint(folder, tmp_path / "q", format="gptq", group_size=32, progress=False)
    checkpoint = open_checkpoint(tmp_path / "q")
    ids = torch.randint(0, 250, (64,), generator=torch.Generator().manual_seed(1))
    model = reference.transformers_model(checkpoint)
    with torch.no_grad():
        exact = model(ids[None]).logits[0]
        theirs = model.to(torch.bfloat16)(ids[None]).logits[0].float()
    ours = reference.our_logits(checkpoint, ids, torch.bfloat16)
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
