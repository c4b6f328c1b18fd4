"""Writes the folders beside it: a model of one layer as GPTQModel 7.7.0 quantizes and saves it.

    GPTQMODEL_CPU_WORKERS=2 python make.py TOKENIZER [NAME…]     the folder of any small tokenizer

On a machine with two processors the package needs that variable. ``pack_dtype`` has an effect only
with ``pack_impl="original"``. The package packs words of 64 bits and cannot compute with them: its
layer says so and refuses to be made, which ``allow_64_bits`` prevents. It computes with AWQ's GEMV
packing only on a GPU, but packs on any machine: see ``pack_gemv``.

Every folder has expected.safetensors: what the package's own code dequantizes, in 16 bits.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

DYNAMIC = {
    r"-:.*k_proj": {},
    r"+:.*gate_proj": {"bits": 8, "group_size": 16},
    r".*down_proj": {"bits": 2, "group_size": 64},
    r".*up_proj": {"bits": 3, "sym": False},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "v1": {"bits": 4, "group_size": 16},
    "v2": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "act_order": {"bits": 4, "group_size": 32, "desc_act": True},
    "dynamic": {"bits": 4, "group_size": 32, "dynamic": DYNAMIC},
    "lm_head": {"bits": 4, "group_size": 32, "lm_head": True},
    "int8_words": {"bits": 4, "group_size": 32, "pack_dtype": "int8", "pack_impl": "original"},
    "int16_words": {
        **{"bits": 8, "group_size": 32, "sym": False, "format": "gptq_v2"},
        **{"pack_dtype": "int16", "pack_impl": "original"},
    },
    "int64_words": {
        **{"bits": 2, "group_size": 32, "desc_act": True},
        **{"pack_dtype": "int64", "pack_impl": "original"},
    },
    "awq": {"bits": 4, "group_size": 32, "method": "awq", "format": "gemm", "sym": False},
    "awq_sym": {"bits": 4, "group_size": 16, "method": "awq", "format": "gemm", "sym": True},
}


def save_plain(folder: Path, tokenizer: str, *, tied: bool) -> None:
    torch.manual_seed(0)
    text = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=-(-len(text) // 32) * 32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        dtype="float16",
    )
    model = LlamaForCausalLM(config).half()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "lm_head" in name:
                parameter *= 10
    model.save_pretrained(folder)
    text.save_pretrained(folder)


def allow_64_bits() -> None:
    TorchLinear.SUPPORTS_PACK_DTYPES = [*TorchLinear.SUPPORTS_PACK_DTYPES, torch.int64]


def dequantized(layer: Any) -> torch.Tensor:
    if hasattr(layer, "dequantize_weight"):
        weight = layer.dequantize_weight()
    else:
        tensors = (layer.qweight, layer.qzeros, layer.scales)
        weight = dequantize_gemm(*tensors, layer.bits, layer.group_size)
    return weight.T.contiguous()


def pack_gemv(awq: Path, target: Path) -> None:
    """The folder ``awq`` packed again by the package's layer for GEMV, with the same scales."""
    tensors = load_file(awq / "model.safetensors")
    expected = load_file(awq / "expected.safetensors")
    config = json.loads((awq / "config.json").read_text())
    settings, size = config["quantization_config"], 64
    settings |= {"version": "gemv", "format": "gemv", "checkpoint_format": "gemv"}
    settings["group_size"] = size
    for module, weight in expected.items():
        del tensors[f"{module}.qzeros"]
        out, columns = weight.shape
        # The least group that the packing has.
        groups = weight.float().view(out, columns // size, size)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        linear = torch.nn.Linear(columns, out, bias=False)
        rounded = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
        linear.weight.data = ((rounded - zeros[..., None]) * scales.float()[..., None]).view_as(
            weight
        )
        layer = AwqGEMVLinear(4, size, False, False, columns, out)
        layer.pack(linear, scales, zeros)
        leaves = ("qweight", "qzeros", "scales")
        tensors |= {f"{module}.{leaf}": getattr(layer, leaf) for leaf in leaves}
        expected[module] = linear.weight.data.half()
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    save_file(expected, target / "expected.safetensors")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(tokenizer: str, names: list[str]) -> None:
    allow_64_bits()
    for name in names or list(VARIANTS):
        target = Path(__file__).parent / name
        target.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            plain, saved = Path(scratch) / "plain", Path(scratch) / "saved"
            save_plain(plain, tokenizer, tied=name != "lm_head")
            options: dict[str, Any] = {
                "device": "cpu",
                "backend": BACKEND.AWQ_TORCH if name.startswith("awq") else BACKEND.TORCH,
                # Scales of GPTQ are float16 in any case, those of AWQ have the model's dtype.
                "dtype": torch.bfloat16 if name == "awq_sym" else torch.float16,
            }
            model = GPTQModel.load(str(plain), QuantizeConfig(**VARIANTS[name]), **options)
            words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
            texts = [" ".join(words[i % 9 :] + words[: i % 7]) * 4 for i in range(32)]
            model.quantize(texts, batch_size=1)
            model.save(str(saved))
            for file in saved.glob("*.safetensors"):
                shutil.copy(file, target / "model.safetensors")
            shutil.copy(saved / "config.json", target / "config.json")
            own = GPTQModel.load(str(saved), **options)
            expected = {}
            for module, layer in own.model.named_modules():
                if hasattr(layer, "qweight"):
                    expected[module] = dequantized(layer)
            save_file(expected, target / "expected.safetensors")
        if name == "awq":
            pack_gemv(target, target.with_name("awq_gemv"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
