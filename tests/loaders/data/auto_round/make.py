"""Writes the checkpoints beside it with auto-round 0.16.1's own packing of linear layers.

    python make.py

Each folder holds a model of one layer, three modules of which are packed, and
expected.safetensors: the weights that the package's layers compute with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM
from auto_round_extension.torch.qlinear_torch import QuantLinear
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as QuantLinearV1
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

LAYER = "model.layers.0."
COMMON = {"bits": 4, "group_size": 16, "sym": False, "data_type": "int", "act_bits": 16}
# The second by its name, the third by a pattern.
EXTRA: dict[str, dict[str, Any]] = {
    f"{LAYER}mlp.gate_proj": {"bits": 8, "group_size": 32},
    r".*down.*": {"sym": True, "group_size": 64},
    r".*proj": {"bits": 2},
}
OF_MODULE: dict[str, dict[str, Any]] = {
    f"{LAYER}mlp.gate_proj": EXTRA[f"{LAYER}mlp.gate_proj"],
    f"{LAYER}mlp.down_proj": EXTRA[r".*down.*"],
    f"{LAYER}self_attn.q_proj": {"bits": 2},
}


def packed(weight: torch.Tensor, kind: str, settings: dict[str, Any]) -> nn.Module:
    bits, size, sym = (settings[name] for name in ("bits", "group_size", "sym"))
    out, columns = weight.shape
    linear = nn.Linear(columns, out, bias=False)
    linear.weight.data = weight
    grouped = weight.view(out, -1, size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    if sym:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    if kind == "auto_round:auto_awq":
        layer = WQLinear_GEMM.from_linear(
            linear, bits, size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        assert isinstance(layer, nn.Module)
        return layer
    of_kind = QuantLinearV1 if kind == "auto_round:auto_gptq" else QuantLinear
    layer = of_kind(bits, size, columns, out, bias=False, weight_dtype=torch.float32)
    layer.device = "cpu"
    layer.pack(linear, scales, zeros, None, device="cpu")
    return layer


def main(kind: str) -> None:
    torch.manual_seed(0)
    folder = Path(__file__).parent / kind.rpartition(":")[2]
    folder.mkdir(exist_ok=True)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=32,
        dtype="bfloat16",
    )
    state = LlamaForCausalLM(config).bfloat16().state_dict()
    expected = {}
    for name, overrides in OF_MODULE.items():
        settings = {**COMMON, **overrides}
        if kind == "auto_round:auto_awq":
            settings["bits"] = 4  # the only width that the layout has
        weight = state.pop(f"{name}.weight").float() * 10
        layer = packed(weight, kind, settings)
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.state_dict().items()}
        with torch.no_grad():
            expected[name] = layer(torch.eye(weight.shape[1])).T.contiguous().float()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    save_file(expected, folder / "expected.safetensors")
    extra = EXTRA
    if kind == "auto_round:auto_awq":
        extra = {n: {k: v for k, v in o.items() if k != "bits"} for n, o in EXTRA.items()}
    quantization = {**COMMON, "quant_method": "auto-round", "packing_format": kind}
    settings = {**config.to_dict(), "quantization_config": {**quantization, "extra_config": extra}}
    (folder / "config.json").write_text(json.dumps(settings, indent=1, default=str) + "\n")


if __name__ == "__main__":
    for packing in ("auto_gptq", "gptqmodel", "auto_awq"):
        main(f"auto_round:{packing}")
