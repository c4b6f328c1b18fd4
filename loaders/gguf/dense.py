"""Converts a GGUF file to a plain bfloat16 checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor

from nybble.kernels.progress import Bar
from nybble.loaders.gguf.folder import write_folder
from nybble.loaders.gguf.index import INDEX
from nybble.loaders.safetensors_file import write_safetensors
from nybble.loaders.shards import Shards


def convert_gguf(file: Path, folder: Path, *, tied: bool) -> None:
    """Write config, tokenizer and dequantized weights of ``file`` to ``folder``.

    tied: the model was published with one matrix for embeddings and output. Its file may hold two
    copies at different precision; the output's is the finer one and is used for both.
    """
    folder.mkdir(parents=True)
    write_folder([file], folder)
    shards = Shards(folder)
    tensors: dict[str, Tensor] = {}
    for stored in Bar(shards.names(), desc="Converting GGUF", unit=" tensors"):
        tensor = shards.read(stored)
        module, _, kind = stored.rpartition(".weight.")
        if module:
            values = dequantize(tensor.numpy(), GGMLQuantizationType[kind])
            tensor = torch.from_numpy(values)
        tensors[f"{module}.weight" if module else stored] = tensor.bfloat16()
    if tied:
        tensors["model.embed_tokens.weight"] = tensors.pop(
            "lm_head.weight", tensors["model.embed_tokens.weight"]
        )
    write_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / INDEX).unlink()
    (folder / file.name).unlink()
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if tied:
        config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config, indent=2))
