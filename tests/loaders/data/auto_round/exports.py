"""Writes the folder ``exports`` beside it: a model of one layer as auto-round 0.16.1 exports it.

    python exports.py TOKENIZER      the folder of any small tokenizer

Every folder has expected.safetensors: the weights of the same run's ``fake`` export, which is
dequantized.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LAYER = "model.layers.0."
MIXED = {
    f"{LAYER}mlp.gate_proj": {"bits": 8, "sym": True},
    f"{LAYER}mlp.down_proj": {"bits": 2},
    f"{LAYER}self_attn.q_proj": {"bits": 16},
}
INTEGERS: dict[str, Any] = {"scheme": "W4A16", "group_size": 32}
# Of each folder: the format, and how the model is quantized.
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_gptq": ("auto_gptq", {**INTEGERS, "sym": True}),
    "auto_gptq_asym": ("auto_gptq", {**INTEGERS, "sym": False}),
    "auto_awq": ("auto_awq", {**INTEGERS, "sym": False}),
    "mixed": ("auto_round", {**INTEGERS, "sym": True, "layer_config": MIXED}),
    "mixed_gptqmodel": (
        "auto_round:gptqmodel",
        {**INTEGERS, "sym": False, "layer_config": MIXED},
    ),
    "mixed_awq": (
        "auto_round:auto_awq",
        {
            **INTEGERS,
            "sym": False,
            "layer_config": {name: {"bits": 16} for name in MIXED},
        },
    ),
    "int8": ("llm_compressor", {"scheme": "INT8"}),
    "nvfp4": ("llm_compressor", {"scheme": "NVFP4"}),
    "mxfp4": ("llm_compressor", {"scheme": "MXFP4"}),
    "fp8": ("llm_compressor", {"scheme": "FP8_STATIC"}),
}
TEXTS = ["the quick brown fox jumps over the lazy dog " * 8] * 4


def export(folder: Path, format: str, tokenizer: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter *= 10
    rounding = AutoRound(
        model,
        tokenizer,
        iters=0,
        nsamples=4,
        seqlen=16,
        dataset=TEXTS,
        device_map="cpu",
        disable_opt_rtn=True,
        **options,
    )
    rounding.quantize_and_save(str(folder), format=format)


def main(tokenizer: str) -> None:
    for name, (format, options) in EXPORTS.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        target = Path(__file__).parent / "exports" / name
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            for kind in (format, "fake"):
                text = AutoTokenizer.from_pretrained(tokenizer)
                export(Path(scratch) / kind, kind, text, dict(options))
            (written,) = (Path(scratch) / format).rglob("config.json")
            (fake,) = (Path(scratch) / "fake").rglob("model.safetensors")
            for file in ("config.json", "model.safetensors"):
                shutil.copy(written.with_name(file), target / file)
            dense = load_file(fake)
            expected = {
                n.removesuffix(".weight"): t for n, t in dense.items() if n.endswith("_proj.weight")
            }
            save_file(expected, target / "expected.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
