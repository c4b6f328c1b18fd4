"""Random models in the formats that are read and not written, for :mod:`load_memory`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

Write = Callable[[int, int], Mapping[str, Tensor]]


def _bytes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    # Up to 126: 127 would be no number in FP8.
    return torch.randint(0, 127, shape, dtype=torch.uint8).view(dtype)


def _scales(*shape: int) -> Tensor:
    return torch.rand(shape).mul(0.01).bfloat16()


def _hqq(out: int, columns: int) -> Mapping[str, Tensor]:
    groups = out * columns // 64
    return {
        "W_q": _bytes(groups // 2, 64),
        "scale": _scales(groups, 1),
        "zero": torch.rand(groups, 1).mul(15).bfloat16(),
        "nbits": torch.tensor(4),
        "axis": torch.tensor(1),
        "shape": torch.tensor([out, columns]),
    }


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    groups = {"config_groups": {"all": group}, "format": format, "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", **groups}


_E4M3 = torch.float8_e4m3fn
# The quantization_config of each, and a module's tensors by its sizes.
READ_ONLY: dict[str, tuple[dict[str, Any], Write]] = {
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        lambda out, columns: {
            "weight": _bytes(out, columns, dtype=_E4M3),
            "weight_scale_inv": torch.rand(-(-out // 128), -(-columns // 128)),
        },
    ),
    "compressed-fp8": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        lambda out, columns: {
            "weight": _bytes(out, columns, dtype=_E4M3),
            "weight_scale": _scales(out, 1),
        },
    ),
    "compressed-nvfp4": (
        _compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
        lambda out, columns: {
            "weight_packed": _bytes(out, columns // 2),
            "weight_scale": _bytes(out, columns // 16, dtype=_E4M3),
            "weight_global_scale": torch.full((1,), 1e4),
        },
    ),
    "compressed-mxfp4": (
        _compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
        lambda out, columns: {
            "weight_packed": _bytes(out, columns // 2),
            "weight_scale": torch.full((out, columns // 32), 120, dtype=torch.uint8),
        },
    ),
    "compressed-int8": (
        _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        lambda out, columns: {
            "weight": _bytes(out, columns, dtype=torch.int8),
            "weight_scale": _scales(out, 1),
        },
    ),
    "llm-int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda out, columns: {
            "weight": _bytes(out, columns, dtype=torch.int8),
            "SCB": torch.rand(out),
        },
    ),
    "hqq": ({"quant_method": "hqq"}, _hqq),
}


def write_read_only(plain: Path, gptq: Path, folder: Path) -> list[Path]:
    """Models of the sizes of ``plain`` in every format here, and ``gptq`` as auto-round has it."""
    written = []
    for name, (settings, write) in READ_ONLY.items():
        target = folder / name
        written.append(target)
        if target.is_dir():
            continue
        tensors = load_file(plain / "model.safetensors")
        for weight in [weight for weight in tensors if weight.endswith("_proj.weight")]:
            out, columns = tensors.pop(weight).shape
            module = weight.removesuffix(".weight")
            tensors |= {f"{module}.{leaf}": t for leaf, t in write(out, columns).items()}
        target.mkdir()
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        _write_config(plain, target, settings)
    if not (auto_round := folder / "auto-round").is_dir():
        shutil.copytree(gptq, auto_round)
        about = {"bits": 4, "group_size": 128, "sym": False}
        _write_config(plain, auto_round, {"quant_method": "auto-round", **about})
    return [*written, auto_round]


def write_gpt_oss(folder: Path) -> Path:
    """Two layers of gpt-oss 20B, with random experts in MXFP4 as it is published."""
    target = folder / "gpt-oss"
    if target.is_dir():
        return target
    sizes = {"num_hidden_layers": 2, "num_local_experts": 32, "vocab_size": 8000}
    config = AutoConfig.for_model("gpt_oss", **sizes, dtype="bfloat16")
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()  # type: ignore[no-untyped-call]
    tensors = {}
    for name, about in shapes.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, out = about.shape
            tensors[name + "_blocks"] = _bytes(experts, out, inputs // 32, 16)
            tensors[name + "_scales"] = torch.full((experts, out, inputs // 32), 120).byte()
        else:
            tensors[name] = torch.rand(about.shape).bfloat16()
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config.save_pretrained(target)
    _write_config(target, target, {"quant_method": "mxfp4"})
    return target


def _write_config(plain: Path, target: Path, settings: Mapping[str, Any]) -> None:
    config = json.loads((plain / "config.json").read_text())
    text = json.dumps({**config, "quantization_config": settings}, indent=2)
    (target / "config.json").write_text(text)
