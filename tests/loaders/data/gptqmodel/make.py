"""Writes the folders beside it: a model of one layer as GPTQModel 7.7.0 quantizes and saves it.

It packs into 32-bit words alone, whatever ``pack_dtype`` is.

    python make.py TOKENIZER [NAME…]      the folder of any small tokenizer

Every folder has expected.safetensors: what the package's own layers dequantize.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
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
}


def save_plain(folder: Path, tokenizer: str) -> None:
    torch.manual_seed(0)
    text = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=-(-len(text) // 32) * 32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        dtype="float16",
    )
    model = LlamaForCausalLM(config).half()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "lm_head" in name:
                parameter *= 10
    model.save_pretrained(folder)
    text.save_pretrained(folder)


def main(tokenizer: str, names: list[str]) -> None:
    for name in names or list(VARIANTS):
        target = Path(__file__).parent / name
        target.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            plain, saved = Path(scratch) / "plain", Path(scratch) / "saved"
            save_plain(plain, tokenizer)
            model = GPTQModel.load(
                str(plain), QuantizeConfig(**VARIANTS[name]), device="cpu", backend=BACKEND.TORCH
            )
            words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
            texts = [" ".join(words[i % 9 :] + words[: i % 7]) * 4 for i in range(32)]
            model.quantize(texts, batch_size=1)
            model.save(str(saved))
            for file in saved.glob("*.safetensors"):
                shutil.copy(file, target / "model.safetensors")
            shutil.copy(saved / "config.json", target / "config.json")
            own = GPTQModel.load(str(saved), device="cpu", backend=BACKEND.TORCH)
            expected = {}
            for module, layer in own.model.named_modules():
                if hasattr(layer, "qweight"):
                    with torch.no_grad():
                        identity = torch.eye(layer.in_features, dtype=torch.float16)
                        expected[module] = layer(identity).T.contiguous()
            save_file(expected, target / "expected.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
