"""Writes the folders ``oneshot_…`` beside it: a model of one layer as llm-compressor quantizes it.

    python oneshot.py TOKENIZER group weight           llmcompressor 0.5.1, compressed-tensors 0.9.4
    python oneshot.py TOKENIZER weight_new fp8_block   0.14.0.1 and 0.19.0

TOKENIZER is the folder of any small tokenizer. GPTQ quantizes the columns in the order of their
activations. With ``group`` the groups are of neighbours in that order and the file has
``weight_g_idx``; with ``weight`` they are of neighbours in the file, which has none. Later versions
write ``weight`` alone.

Every folder has expected.safetensors: what the package decompresses its own file to.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


def ordered(order: str) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return {"targets": ["Linear"], "weights": {**weights, "group_size": 16, "actorder": order}}


FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
SCHEMES = {
    "group": ordered("group"),
    "weight": ordered("weight"),
    "weight_new": ordered("weight"),
    # As the preset FP8_BLOCK, with smaller blocks: 72 rows are not a multiple of theirs.
    "fp8_block": {
        "targets": ["Linear"],
        "weights": {**FP8, "strategy": "block", "block_structure": [16, 32]},
        "input_activations": {**FP8, "strategy": "group", "group_size": 32, "dynamic": True},
    },
}


def plain(folder: Path, tokens: int, intermediate: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=32,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter *= 10
    model.save_pretrained(folder)


def main(tokenizer: str, kind: str) -> None:
    text = AutoTokenizer.from_pretrained(tokenizer)
    texts = [" ".join(WORDS[i % 9 :] + WORDS[: i % 7]) * 4 for i in range(32)]
    rows = [text(each, truncation=True, max_length=48).data for each in texts]
    options = {"config_groups": {"group_0": SCHEMES[kind]}, "ignore": ["lm_head"]}
    modifier = QuantizationModifier if kind == "fp8_block" else GPTQModifier
    target = Path(__file__).parent / f"oneshot_{kind}"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source, saved = Path(scratch) / "plain", Path(scratch) / "saved"
        plain(source, -(-len(text) // 32) * 32, 72 if kind == "fp8_block" else 64)
        text.save_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.bfloat16)
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=modifier(**options),
            max_seq_length=48,
            num_calibration_samples=len(rows),
        )
        model.save_pretrained(saved, save_compressed=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(saved / file, target / file)
        whole = AutoModelForCausalLM.from_pretrained(
            saved,
            torch_dtype=torch.bfloat16,
            quantization_config=CompressedTensorsConfig(run_compressed=False),
        )
        expected = {
            name: module.weight.detach().contiguous()
            for name, module in whole.named_modules()
            if name.endswith("_proj")
        }
        save_file(expected, target / "expected.safetensors")


if __name__ == "__main__":
    for each in sys.argv[2:]:
        main(sys.argv[1], each)
