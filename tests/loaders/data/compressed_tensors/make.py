"""Writes the checkpoints beside it with the package that owns the format.

    python make.py schemes      with compressed-tensors 0.20.1
    python make.py float        with compressed-tensors 0.20.1
    python make.py nvfp4        with compressed-tensors 0.20.1
    python make.py mxfp4        with compressed-tensors 0.20.1
    python make.py int          with compressed-tensors 0.20.1
    python make.py naive        with compressed-tensors 0.20.1
    python make.py w4a8         with compressed-tensors 0.20.1
    python make.py act_order    with compressed-tensors 0.9.4: later ones do not order by activation

Each folder holds a model of one layer, and expected.safetensors: the weights that the package
dequantizes its own tensors to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

try:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.utils.match import match_targets
except ImportError:
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32
    from compressed_tensors.quantization.lifecycle.apply import (
        find_name_or_class_matches as match_targets,
    )


def weights(**settings: object) -> dict[str, object]:
    return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, **settings}


LAYER = "model.layers.0."
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group"}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group"}
FORMATS = {
    "float": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "int": "int-quantized",
    "naive": "naive-quantized",
    "w4a8": "int-quantized",
}
SCHEMES = {
    "schemes": {
        "symmetric": (["re:.*q_proj$"], weights(symmetric=True)),
        "asymmetric": (
            ["re:.*self_attn\\..*", f"{LAYER}mlp.gate_proj"],
            weights(symmetric=False),
        ),
        "channel": (["Linear"], weights(symmetric=False, strategy="channel", group_size=None)),
        "eight": (
            [f"{LAYER}mlp.down_proj", f"{LAYER}self_attn.k_proj"],
            weights(symmetric=True, num_bits=8),
        ),
    },
    "float": {
        "channel": (["Linear"], {**FLOAT, "strategy": "channel"}),
        "tensor": ([f"{LAYER}mlp.down_proj"], {**FLOAT, "strategy": "tensor"}),
        "block": (
            ["re:.*self_attn.*"],
            {**FLOAT, "strategy": "block", "block_structure": [16, 16]},
        ),
    },
    "nvfp4": {"all": (["Linear"], {**FP4, "strategy": "tensor_group", "group_size": 16})},
    "mxfp4": {"all": (["Linear"], {**FP4, "group_size": 32, "scale_dtype": torch.uint8})},
    "int": {
        "channel": (["Linear"], {**INT8, "strategy": "channel"}),
        "tensor": ([f"{LAYER}mlp.down_proj"], {**INT8, "strategy": "tensor"}),
        "group": (["re:.*self_attn.[kv].*"], {**INT8, "symmetric": False, "group_size": 16}),
        "asymmetric": (
            [f"{LAYER}mlp.up_proj"],
            {**INT8, "symmetric": False, "strategy": "channel"},
        ),
    },
    "naive": {
        "channel": (["Linear"], {**INT8, "strategy": "channel"}),
        "asymmetric": (
            ["re:.*mlp.*"],
            {**INT8, "symmetric": False, "strategy": "channel", "actorder": None},
        ),
    },
    "w4a8": {
        "four": (["Linear"], weights(symmetric=True, strategy="channel", group_size=None)),
        "groups": (["re:.*self_attn.*"], weights(symmetric=True)),
    },
    "act_order": {
        "asymmetric": (["re:.*self_attn.*"], weights(symmetric=False, actorder="group")),
        "symmetric": (["Linear"], weights(symmetric=True, actorder="group")),
    },
}
# Of each token, while it is computed.
ACTIVATIONS = {
    "w4a8": {
        "input_activations": {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    },
}
MODULES = (
    *(f"{LAYER}self_attn.{part}_proj" for part in "qkvo"),
    *(f"{LAYER}mlp.{part}_proj" for part in ("gate", "up", "down")),
)


def compressed(
    weight: torch.Tensor, args: QuantizationArgs, kind: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors below a module, and the weight they stand for."""
    out, columns = weight.shape
    if args.type == "float" and args.num_bits == 8:
        return in_float(weight, args)
    if args.type == "float" or kind in FORMATS:
        return by_compressor(weight, args, FORMATS[kind])
    size = args.group_size or columns
    more, grouped = {}, weight
    if args.actorder == "group":
        g_idx = (torch.arange(columns) // size)[torch.randperm(columns)]
        more["g_idx"] = g_idx.int()
        grouped = weight[:, g_idx.argsort(stable=True)]
    grouped = grouped.view(out, columns // size, size)
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    known = {"scale": scale, "zero_point": zero_point, **more}
    codes = quantize(weight, args=args, dtype=torch.int8, **known)
    tensors = {
        "weight_packed": pack_to_int32(codes, args.num_bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
        **{f"weight_{name}": tensor for name, tensor in more.items()},
    }
    if not args.symmetric:
        points = pack_to_int32(zero_point.to(torch.int8), args.num_bits, packed_dim=0)
        tensors["weight_zero_point"] = points.contiguous()
    return tensors, dequantize(codes, args=args, **known)


def in_float(
    weight: torch.Tensor, args: QuantizationArgs
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    out, columns = weight.shape
    height, width = {"channel": (1, columns), "tensor": (out, columns)}.get(
        args.strategy, args.block_structure
    )
    blocks = weight.view(out // height, height, columns // width, width)
    scale, zero_point = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    if args.strategy == "tensor":
        scale, zero_point = scale.reshape(1), zero_point.reshape(1)
    known = {"scale": scale, "zero_point": zero_point}
    codes = quantize(weight, args=args, dtype=torch.float8_e4m3fn, **known)
    tensors = {"weight": codes, "weight_scale": scale}
    return tensors, dequantize(codes, args=args, **known)


def by_compressor(
    weight: torch.Tensor, args: QuantizationArgs, format: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """By the package's own compressor for one module."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import generate_gparam

    out, columns = weight.shape
    size = args.group_size or columns
    grouped = weight.view(out, columns // size, size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if args.strategy == "tensor":
        low, high = low.min().reshape(1), high.max().reshape(1)
    state = {"weight": weight}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(low.min(), high.max())
    scale, zero_point = calculate_qparams(
        low, high, args, global_scale=state.get("weight_global_scale")
    )
    state["weight_scale"] = scale
    if not args.symmetric:
        state["weight_zero_point"] = zero_point
    compressor = BaseCompressor.get_value_from_registry(format)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def main(kind: str) -> None:
    torch.manual_seed(0)
    folder = Path(__file__).parent / kind
    folder.mkdir(exist_ok=True)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64 if kind == "mxfp4" else 48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        dtype="bfloat16",
    )
    state = LlamaForCausalLM(config).bfloat16().state_dict()
    quantization = QuantizationConfig(
        config_groups={
            name: {"targets": targets, "weights": args, **ACTIVATIONS.get(kind, {})}
            for name, (targets, args) in SCHEMES[kind].items()
        },
        format=FORMATS.get(kind, "pack-quantized"),
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    groups = quantization.config_groups.values()
    scheme_of = {target: group.weights for group in groups for target in group.targets}
    expected = {}
    for name in MODULES:
        target = match_targets(name, torch.nn.Linear(1, 1), list(scheme_of))[0]
        weight = state.pop(f"{name}.weight") * 10
        tensors, dequantized = compressed(weight, scheme_of[target], kind)
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
        expected[name] = dequantized
    state[f"{LAYER}self_attn.k_scale"] = torch.ones(1)  # of a quantized KV cache
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    save_file(expected, folder / "expected.safetensors")
    settings = {**config.to_dict(), "quantization_config": quantization.to_dict()}
    text = json.dumps(settings, indent=1, default=str)
    (folder / "config.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
