"""HQQ checkpoints: a file that the package wrote, against its own dequantization.

``data/hqq/make.py`` made the file.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.kernels import PackedWeight
from nybble.kernels.matmul import packed_matmul
from nybble.loaders import CheckpointError, open_checkpoint, save_packed
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.footprint import weight_bytes
from nybble.loaders.formats import Settings
from nybble.loaders.formats.hqq import Hqq
from nybble.loaders.shards import Shards

FILES = Path(__file__).parent / "data" / "hqq"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(FILES, tmp_path / "hqq"))
    (folder / "expected.safetensors").unlink()
    return folder


def packed(folder: Path) -> dict[str, PackedWeight]:
    checkpoint, shards = open_checkpoint(folder), Shards(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    assert isinstance(checkpoint.quantization, Hqq)
    checkpoint.check(shards)
    weights = {n: checkpoint.projection(shards, n) for n in checkpoint.architecture.linears}
    return {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}


def test_every_weight_equals_the_package_s_own(model: Path) -> None:
    """Of 1, 2, 3, 4 and 8 bits; it takes the difference and the product in float16."""
    expected = load_file(FILES / "expected.safetensors")
    found = packed(model)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        two_roundings = 2**-10 * expected[name].abs().max()
        assert (weight.dequantize() - expected[name].float()).abs().max() <= two_roundings, name
        x = torch.randn(3, weight.in_features)
        torch.testing.assert_close(
            packed_matmul(x, weight), x @ weight.dequantize().T, rtol=1e-4, atol=1e-5
        )


def test_it_survives_packing_for_the_cpu(model: Path, tmp_path: Path) -> None:
    save_packed(open_checkpoint(model), tmp_path / "p", layout="cpu_tiles", progress=False)
    before, after = (dict(open_checkpoint(f).weights()) for f in (model, tmp_path / "p"))
    for name, weight in before.items():
        if isinstance(weight, PackedWeight):
            other = after[name]
            assert isinstance(other, PackedWeight)
            assert torch.equal(other.dequantize(), weight.dequantize())


def test_the_size_is_what_loading_takes(model: Path) -> None:
    found = packed(model).values()
    total = sum(weight.nbytes - weight.levels.nbytes for weight in found)
    columns = sum(weight.columns for weight in found if weight.perm is not None)
    tensors = load_file(model / "model.safetensors")
    total += sum(t.nbytes for n, t in tensors.items() if n.endswith(".weight"))
    assert weight_bytes(model, torch.float16) == total - 4 * columns


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("axis", 0, "has 4 bits along axis 0, expected 1, 2, 3, 4, 8 along axis 1"),
        ("nbits", 5, "has 5 bits along axis 1"),
        ("view_as_float", 1, "has view_as_float or quant_scale, which are not supported"),
    ],
)
def test_what_is_not_supported_is_named(model: Path, leaf: str, value: int, message: str) -> None:
    tensors = load_file(model / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{leaf}"
    tensors[name] = torch.tensor(value, dtype=tensors[name].dtype)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"self_attn.q_proj {message}"):
        packed(model)


def test_missing_rows_are_named(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.W_q"
    tensors[name] = tensors[name][:8].clone()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.W_q has codes for 16 groups, expected 64"):
        packed(model)


def test_quantized_scales_are_refused_by_field() -> None:
    given = {"quant_config": {"scale_quant_params": {"nbits": 8}}}
    with pytest.raises(CheckpointError, match=r"quant_config is .*scale_quant_params"):
        Hqq.from_settings(Settings(given, "config.json"))
