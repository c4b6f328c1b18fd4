"""Tensors of other sizes than config.json's are refused: the kernels would read beyond them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble import LLM
from nybble.engine import Engine, EngineConfig
from nybble.loaders import CheckpointError, open_checkpoint

CONFIG = EngineConfig(dtype=torch.bfloat16, kv_cache_bytes=1 << 20)


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        (
            "vocab_size",
            400,
            "model.embed_tokens.weight has shape (320, 128), config.json says (400, 128)",
        ),
        (
            "num_key_value_heads",
            4,
            "self_attn.k_proj.weight has shape (64, 128), config.json says (128, 128)",
        ),
        (
            "intermediate_size",
            512,
            "mlp.down_proj.weight has shape (128, 256), config.json says (128, 512)",
        ),
        (
            "hidden_size",
            256,
            "mlp.down_proj.weight has shape (128, 256), config.json says (256, 256)",
        ),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, setting: str, value: int, named: str
) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(CheckpointError, match=r"has shape \(.*, config.json says \(") as refused:
        Engine.load(open_checkpoint(folder), CONFIG, progress=False)
    assert named in str(refused.value)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_too_short_is_named(
    tiny_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name][:64].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has shape \(.*, config.json says \(") as refused:
        Engine.load(open_checkpoint(folder), CONFIG, progress=False)
    assert name.removesuffix(".weight") in str(refused.value)
    assert str(folder) in str(refused.value)


def test_a_programs_own_model_is_refused_alike(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=f"{folder} has no .* model.layers.1.self_attn.k_proj"
    ):
        LLM(str(folder))
