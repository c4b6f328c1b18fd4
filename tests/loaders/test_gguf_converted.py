"""Models with experts, and Apertus, as llama.cpp's own converter writes them to GGUF files.

``data/gguf/make.py`` made the files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import open_checkpoint, resolve_model
from nybble.models import architecture_of

FILES = Path(__file__).parent / "data" / "gguf"


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor, dequantized; biases by themselves."""
    found = {}
    for name, weight in open_checkpoint(folder).weights():
        if isinstance(weight, Tensor):
            found[name] = weight.float()
            continue
        dense = weight.weight if isinstance(weight, DenseWeight) else weight.dequantize()
        found[name] = dense.float()
        if weight.bias is not None:
            found[name + ".bias"] = weight.bias.float()
    return found


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "apertus"]
)
def test_a_converted_file_is_the_model_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same layers, settings and weights; gpt-oss from MXFP4 to MXFP4."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = Path(shutil.copy(FILES / name / "model.gguf", tmp_path / "model.gguf"))
    folder = resolve_model(str(file))
    read, original = open_checkpoint(folder), open_checkpoint(FILES / name)
    assert architecture_of(read.config) == architecture_of(original.config)
    found, expected = weights_of(folder), weights_of(FILES / name)
    assert found.keys() == expected.keys()
    for module, weight in expected.items():
        assert torch.equal(found[module], weight), module
    packed = {n for n, weight in read.weights() if isinstance(weight, PackedWeight)}
    assert all(".experts." in module for module in packed)
    assert len(packed) == (12 if name == "gpt_oss" else 0)
