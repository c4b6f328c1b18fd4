"""The memory a model is said to need is what its loaded weights take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import Checkpoint, open_checkpoint, save_packed
from nybble.loaders.footprint import weight_bytes
from nybble.quantizers import InFlight, quantize_checkpoint

LEVELS_BYTES = 64  # of each packed weight: 16 float32, which no file stores


def loaded_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    total = 0
    for _, weight in checkpoint.weights():
        if isinstance(weight, PackedWeight):
            total += weight.nbytes - LEVELS_BYTES
        elif isinstance(weight, DenseWeight):
            total += weight.weight.numel() * dtype.itemsize
            total += 0 if weight.bias is None else weight.bias.numel() * dtype.itemsize
        else:
            total += weight.numel() * dtype.itemsize
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_a_16_bit_model(tiny_model: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = tiny_model()
    assert weight_bytes(folder, dtype) == loaded_bytes(open_checkpoint(folder), dtype)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("gptq", {"group_size": 32, "sym": True}),
        ("gptq", {"group_size": 32, "sym": False}),
        ("gptq", {"group_size": 32, "bits": 2, "sym": True}),
        ("gptq", {"group_size": 32, "bits": 3}),
        ("awq", {"group_size": 64}),
        ("nf4", {"double_quant": False}),
        ("nf4", {"double_quant": True}),
    ],
    ids=str,
)
def test_of_a_quantized_model_and_of_its_packed_form(
    tiny_model: Callable[..., Path], tmp_path: Path, format: str, options: dict[str, int]
) -> None:
    folder, packed = tmp_path / format, tmp_path / "packed"
    quantize_checkpoint(tiny_model(), folder, format=format, progress=False, **options)
    expected = loaded_bytes(open_checkpoint(folder), torch.bfloat16)
    assert weight_bytes(folder, torch.bfloat16) == expected
    save_packed(open_checkpoint(folder), packed, layout="rows", progress=False)
    assert weight_bytes(packed, torch.bfloat16) == expected


def test_of_an_8_bit_model_is_a_little_high(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers that share an input share the order of its columns, which their files repeat."""
    options = {"format": "gptq", "group_size": 32, "bits": 8, "progress": False}
    quantize_checkpoint(tiny_model(), tmp_path / "q", **options)  # type: ignore[arg-type]
    taken = loaded_bytes(open_checkpoint(tmp_path / "q"), torch.bfloat16)
    assert taken <= weight_bytes(tmp_path / "q", torch.bfloat16) < 1.03 * taken


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_model_rounded_while_loading(tiny_model: Callable[..., Path], tied: bool) -> None:
    folder = tiny_model(tie_word_embeddings=tied)
    rounded = InFlight(open_checkpoint(folder), layers="nf4", head="int8")
    found = weight_bytes(folder, torch.bfloat16, layers="4bit", head="int8")
    assert found == loaded_bytes(rounded, torch.bfloat16)


def test_of_a_model_whose_output_layer_is_quantized_already(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """It is not rounded again, and the embedding is not counted in its place."""
    folder, settings = tmp_path / "q", {"format": "gptq", "group_size": 32, "progress": False}
    quantize_checkpoint(tiny_model(vocab_size=320), folder, **settings)  # type: ignore[arg-type]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    gate = "model.layers.0.mlp.gate_proj."
    for name in [name for name in tensors if name.startswith(gate)]:
        tensors["lm_head." + name.removeprefix(gate)] = tensors[name].clone()
    save_file(tensors, file)
    alone = weight_bytes(folder, torch.bfloat16)
    assert weight_bytes(folder, torch.bfloat16, head="int8") == alone
