"""Converts a GGUF file to a plain bfloat16 checkpoint folder (Qwen2 architecture).

Llama-type GGUF files store q and k with their rows permuted and are refused here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from nybble.kernels.progress import Bar
from nybble.loaders.errors import CheckpointError
from nybble.loaders.safetensors_file import write_safetensors

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# GGUF files do not hold them; these are what the makers of Qwen2.5 recommend.
_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def convert_gguf(file: Path, folder: Path, *, tied: bool) -> None:
    """Write config, tokenizer and dequantized weights of ``file`` to ``folder``.

    tied: the model was published with one matrix for embeddings and output. GGUF files keep two
    copies of it at different precision; the output's is the finer one and is used for both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "qwen2":
        raise CheckpointError(f"{file}: architecture {architecture!r}, supported is qwen2")
    tensors: dict[str, Tensor] = {}
    for tensor in Bar(reader.tensors, desc="Converting GGUF", unit=" tensors"):
        # torch.tensor copies: float32 entries are read-only views of the mapped file.
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        tensors[_name(tensor.name)] = values.reshape(*map(int, reversed(tensor.shape))).bfloat16()
    if tied:
        tensors["model.embed_tokens.weight"] = tensors.pop(
            "lm_head.weight", tensors["model.embed_tokens.weight"]
        )
    write_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.tie_word_embeddings = tied
    config.dtype = "bfloat16"
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    ids = [tokenizer.convert_tokens_to_ids(end) for end in ("<|im_end|>", "<|endoftext|>")]
    ends = [end for end in ids if end is not None]
    generation = {"eos_token_id": ends, "do_sample": True, **_SAMPLING}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, layer, part, leaf = name.split(".")
    return f"model.layers.{layer}.{_LAYER[part]}.{leaf}"
