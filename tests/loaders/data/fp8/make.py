"""Writes the folders beside it: a model of one layer as transformers 5.24 quantizes it to FP8.

    python make.py

It quantizes on a CPU as on a GPU, but refuses to without one: ``validate_environment`` is replaced.
Experts' weights are saved one by one and their scales stacked, which no published checkpoint has;
the script separates the scales.

Every folder has expected.safetensors: what transformers dequantizes as it loads the folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

BLOCK = (32, 16)
MIXTURE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "float": ("llama", "float", {}),
    "ue8m0": ("llama", "ue8m0", {}),
    "experts": ("qwen3_moe", "float", MIXTURE),
}


def separated(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors.items():
        prefix, below, projection = name.partition(".experts.")
        parts = {"gate_up_proj_scale_inv": ("gate_proj", "up_proj")}.get(projection, ("down_proj",))
        if not below or not projection.endswith("proj_scale_inv"):
            found[name] = tensor
            continue
        for expert, scales in enumerate(tensor):
            for part, rows in zip(parts, scales.chunk(len(parts)), strict=True):
                found[f"{prefix}.experts.{expert}.{part}.weight_scale_inv"] = rows.contiguous()
    return found


def main(name: str) -> None:
    model_type, scale_format, more = VARIANTS[name]
    target = Path(__file__).parent / name
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **more,
    )
    with tempfile.TemporaryDirectory() as scratch:
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(scratch)
        settings = FineGrainedFP8Config(weight_block_size=BLOCK, scale_fmt=scale_format)
        check = FineGrainedFP8HfQuantizer.validate_environment
        FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **options: None
        model = AutoModelForCausalLM.from_pretrained(
            scratch, dtype=torch.bfloat16, device_map="cpu", quantization_config=settings
        )
        model.save_pretrained(target)
        FineGrainedFP8HfQuantizer.validate_environment = check
    (target / "generation_config.json").unlink()
    tensors = separated(load_file(target / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    whole = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16, device_map="cpu")
    expected = {name: each for name, each in whole.state_dict().items() if "proj" in name}
    save_file(expected, target / "expected.safetensors")


if __name__ == "__main__":
    for each in VARIANTS:
        main(each)
