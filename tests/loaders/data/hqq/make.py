"""Writes the checkpoint beside it with hqq 0.2.8.post1: one layer, six modules of it quantized.

expected.safetensors holds the weights that the package dequantizes them to.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

LAYER = "model.layers.0."
# bits and group_size, None for one group an output.
SETTINGS = {
    "self_attn.q_proj": (4, 16),
    "self_attn.k_proj": (2, 16),
    "self_attn.v_proj": (3, 16),
    "self_attn.o_proj": (1, 16),
    "mlp.gate_proj": (8, 32),
    "mlp.down_proj": (4, None),
}


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        dtype="float16",
    )
    state = LlamaForCausalLM(config).half().state_dict()
    expected = {}
    for name, (bits, size) in SETTINGS.items():
        weight = state.pop(f"{LAYER}{name}.weight")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        layer = HQQLinear(
            linear,
            BaseQuantizeConfig(nbits=bits, group_size=size, axis=1),
            compute_dtype=torch.float16,
            device="cpu",
        )
        tensors = {leaf: t for leaf, t in layer.state_dict().items() if t is not None}
        state |= {f"{LAYER}{name}.{leaf}": tensor.data for leaf, tensor in tensors.items()}
        expected[LAYER + name] = layer.dequantize()
    folder = Path(__file__).parent
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    save_file(expected, folder / "expected.safetensors")
    quantization = {
        "quant_method": "hqq",
        "quant_config": BaseQuantizeConfig(nbits=4, group_size=16, axis=1),
        "skip_modules": ["lm_head"],
    }
    settings = {**config.to_dict(), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
