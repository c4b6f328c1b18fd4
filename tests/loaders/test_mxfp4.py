"""gpt-oss as it is published: experts in MXFP4, read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nybble.kernels import PackedWeight
from nybble.loaders import CheckpointError, LoRAAdapter, open_checkpoint, save_packed
from nybble.quantizers import merge_adapter

EXPERTS, HIDDEN, INTERMEDIATE = 3, 64, 96


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny gpt-oss whose stacked experts are random codes and exponents."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        _, inputs, out = tensors.pop(name).shape
        shape = (EXPERTS, out, inputs // 32)
        tensors[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[name + "_scales"] = torch.randint(118, 126, shape, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


def test_experts_are_kept_in_4_bits_and_are_what_transformers_dequantizes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    found = dict(open_checkpoint(folder).weights())
    for layer in range(2):
        stored = f"model.layers.{layer}.mlp.experts."
        expected: dict[str, Tensor] = {}
        for name in ("gate_up_proj", "down_proj"):
            parts = tensors[f"{stored}{name}_blocks"], tensors[f"{stored}{name}_scales"]
            # (experts, in, out), with gate and up by turns.
            expected[name] = convert_moe_packed_tensors(*parts, dtype=torch.float32).mT
        for expert in range(EXPERTS):
            both = expected["gate_up_proj"][expert]
            gate_up = torch.cat((both[0::2], both[1::2]))
            for name, weight in (
                ("gate_up_proj", gate_up),
                ("down_proj", expected["down_proj"][expert]),
            ):
                packed = found[f"{stored}{expert}.{name}"]
                assert isinstance(packed, PackedWeight)
                assert torch.equal(packed.dequantize(), weight)
            bias = tensors[f"{stored}gate_up_proj_bias"][expert]
            packed = found[f"{stored}{expert}.gate_up_proj"]
            assert isinstance(packed, PackedWeight)
            assert packed.bias is not None
            assert torch.equal(packed.bias, torch.cat((bias[0::2], bias[1::2])))


def test_in_16_bits_it_is_a_model_that_transformers_reads(folder: Path) -> None:
    target = folder.parent / "merged"
    merge_adapter(folder, LoRAAdapter({}, b""), target, format="bf16", progress=False)
    tensors = load_file(folder / "model.safetensors")
    model, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in model.state_dict().items():
        if name in tensors:
            assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name
        else:
            parts = tensors[name + "_blocks"], tensors[name + "_scales"]
            assert torch.equal(tensor, convert_moe_packed_tensors(*parts, dtype=tensor.dtype)), name


def test_a_weight_takes_four_and_a_quarter_bits(folder: Path) -> None:
    """In memory, as the footprint says beforehand, and in the packed form on disk."""
    checkpoint = open_checkpoint(folder)
    weights = dict(checkpoint.weights())
    packed = [weight for weight in weights.values() if isinstance(weight, PackedWeight)]
    assert len(packed) == 2 * EXPERTS * 2
    for weight in packed:
        assert weight.qweight.nbytes + weight.scales.nbytes == weight.out_features * (
            weight.in_features * 17 // 32
        )
    name = "model.layers.0.mlp.experts.0.down_proj"
    down = weights[name]
    assert isinstance(down, PackedWeight)
    save_packed(checkpoint, folder.parent / "packed", layout="cpu_tiles", progress=False)
    again = dict(open_checkpoint(folder.parent / "packed").weights())[name]
    assert isinstance(again, PackedWeight)
    assert again.scales.dtype == torch.uint8
    assert torch.equal(again.dequantize(), down.dequantize())


def test_an_exponent_which_is_no_number_is_refused_by_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][1, 2, 0] = 255
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.1\.down_proj: a scale is not finite"):
        list(open_checkpoint(folder).weights())


def test_the_model_computes_the_logits_of_its_dequantized_weights(
    reference: Any, folder: Path
) -> None:
    reference.assert_same_logits(open_checkpoint(folder))


def test_scales_that_do_not_fit_the_blocks_are_refused_by_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :, :-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.0\.down_proj has blocks"):
        list(open_checkpoint(folder).weights())


def test_experts_missing_doubled_or_of_another_count_are_refused_by_name(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    blocks, scales = whole[name + "_blocks"], whole[name + "_scales"]
    fewer = {name + "_blocks": blocks[1:].clone(), name + "_scales": scales[1:].clone()}
    _, out, groups, half = blocks.shape
    for tensors, reason in (
        (
            {name + "_blocks": None, name + "_scales": None},
            r"has no tensor .*experts\.0\.down_proj",
        ),
        ({name + "_scales": None}, r"has no tensor .*experts\.0\.down_proj.*scales"),
        ({name: torch.zeros(EXPERTS, groups * 2 * half, out)}, r"experts\.0\.down_proj\.weight"),
        (fewer, rf"holds {EXPERTS - 1} experts, but config\.json says {EXPERTS}"),
    ):
        kept = {each: t for each, t in (whole | tensors).items() if t is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=reason):
            list(open_checkpoint(folder).weights())
