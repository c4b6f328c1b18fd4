"""FP8 checkpoints are loaded in 16 bits, as transformers dequantizes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import CheckpointError, LoRAAdapter, load_adapter, open_checkpoint
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.footprint import weight_bytes
from nybble.loaders.formats import Settings
from nybble.loaders.formats.fp8 import Fp8
from nybble.loaders.shards import Shards
from nybble.quantizers import InFlight, merge_adapter

BLOCK = 64
FILES = Path(__file__).parent / "data" / "fp8"


def written(source: Path, folder: Path, scheme: str) -> Path:
    """The tiny model in FP8, its layers' scales by block, by output or one a matrix."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        out, columns = weight.shape
        if scheme == "block":
            blocks = weight.view(out // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            each = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        elif scheme == "output":
            each = scale = weight.abs().amax(1, keepdim=True) / 448
        else:
            each = scale = (weight.abs().amax() / 448).reshape(1)
        tensors[name] = (weight / each).to(torch.float8_e4m3fn)
        suffix = "_scale_inv" if scheme == "block" else "_scale"
        tensors[name + suffix] = scale
        if scheme == "matrix":
            tensors[name.replace("weight", "input_scale")] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if scheme == "block":
        config["quantization_config"]["weight_block_size"] = [BLOCK, BLOCK]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["block", "output", "matrix"])
def fp8(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    return written(tiny_model(), tmp_path / "fp8", request.param)


def dense(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    shards, found = Shards(folder), {}
    for name in checkpoint.architecture.linears:
        weight = checkpoint.projection(shards, name)
        assert isinstance(weight, DenseWeight)
        found[name] = weight.weight
    return found


@pytest.mark.parametrize("name", ["float", "ue8m0", "experts"])
def test_files_that_transformers_quantized_have_the_weights_it_finds_in_them(
    name: str, tmp_path: Path
) -> None:
    """Blocks of 32×16 with scales in float32 and in powers of two, and those of experts.
    ``data/fp8/make.py`` made the files."""
    folder = Path(shutil.copytree(FILES / name, tmp_path / name))
    expected = load_file(folder / "expected.safetensors")
    (folder / "expected.safetensors").unlink()
    for stacked in [name for name in expected if name.endswith(("gate_up_proj", "down_proj"))]:
        prefix, _, leaf = stacked.rpartition(".")
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for expert, both in enumerate(expected.pop(stacked)):
            for part, weight in zip(parts, both.chunk(len(parts)), strict=True):
                expected[f"{prefix}.{expert}.{part}.weight"] = weight
    found = dense(folder)
    assert found.keys() == {name.removesuffix(".weight") for name in expected}
    for module, weight in found.items():
        assert torch.equal(weight, expected[module + ".weight"]), module


def test_blocks_are_dequantized_as_transformers_does_it(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = written(tiny_model(), tmp_path / "fp8", "block")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK)),
    )
    for name, weight in dense(folder).items():
        assert torch.equal(weight, model.get_submodule(name).weight.bfloat16())


def test_every_weight_is_near_the_one_that_was_rounded(
    fp8: Path, tiny_model: Callable[..., Path]
) -> None:
    original = load_file(tiny_model() / "model.safetensors")
    for name, weight in dense(fp8).items():
        exact = original[name + ".weight"].float()
        # Three bits of mantissa; below 2⁻⁶ the steps are even.
        step = exact.abs() * 2**-4 + exact.abs().max() / 448 * 2**-9
        assert ((weight.float() - exact).abs() <= step * 1.02).all()


def test_a_short_block_at_the_end_is_cut_off(tmp_path: Path) -> None:
    weight = torch.ones(5, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    save_file(
        {"layer.weight": weight, "layer.weight_scale_inv": scale}, tmp_path / "model.safetensors"
    )
    found = Fp8.from_settings(Settings({"weight_block_size": [3, 4]}, "test")).read(
        Shards(tmp_path), "layer"
    )
    assert found.weight[:, 0].tolist() == [1, 1, 1, 3, 3]
    assert found.weight[4].tolist() == [3, 3, 3, 3, 4, 4]


def test_bytes_are_exponents(tmp_path: Path) -> None:
    weight, scale = torch.ones(2, 2).to(torch.float8_e4m3fn), torch.tensor([[128], [126]]).byte()
    save_file(
        {"layer.weight": weight, "layer.weight_scale_inv": scale}, tmp_path / "model.safetensors"
    )
    found = Fp8.from_settings(Settings({}, "test")).read(Shards(tmp_path), "layer")
    assert found.weight.tolist() == [[2, 2], [0.5, 0.5]]


def test_it_is_said_and_counted(fp8: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = dict(open_checkpoint(fp8).weights())
    assert "fp8 weights are dequantized to 16 bits" in caplog.text
    total = 0
    for weight in weights.values():
        parts = [weight] if isinstance(weight, Tensor) else [weight.weight, weight.bias]  # type: ignore[union-attr]
        total += sum(part.nbytes for part in parts if part is not None)
    assert weight_bytes(fp8, torch.bfloat16) == total


def test_it_can_be_rounded_to_4_bits_while_it_is_loaded(fp8: Path) -> None:
    rounded = dict(InFlight(open_checkpoint(fp8), layers="nf4").weights())
    packed = [weight for weight in rounded.values() if isinstance(weight, PackedWeight)]
    assert len(packed) == 8
    assert weight_bytes(fp8, torch.bfloat16, layers="4bit") < weight_bytes(fp8, torch.bfloat16)


def test_merging_names_the_formats_it_can_write(
    fp8: Path, tmp_path: Path, tiny_adapter: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(fp8)
    assert isinstance(checkpoint, FolderCheckpoint)
    adapter: LoRAAdapter = load_adapter(tiny_adapter(), checkpoint.architecture)
    with pytest.raises(CheckpointError, match=r"fp8 can be read and not written: .*gptq.*bf16"):
        merge_adapter(fp8, adapter, tmp_path / "x", progress=False)
    merge_adapter(fp8, adapter, tmp_path / "merged", format="bf16", progress=False)
    before, after = dense(fp8), dense(tmp_path / "merged")
    for name, module in adapter.modules.items():
        exact = before[name].float() + module.scale * module.b @ module.a
        assert torch.equal(after[name], exact.bfloat16())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fmt": "e5m2"}, "fmt is 'e5m2', expected e4m3"),
        ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4', expected fp8"),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\], expected two"),
    ],
)
def test_what_is_not_supported_is_refused_by_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Fp8.from_settings(Settings(given, "config.json"))
