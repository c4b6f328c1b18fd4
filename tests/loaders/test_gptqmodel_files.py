"""GPTQ and AWQ checkpoints that GPTQModel quantized and saved, against what it dequantizes itself.

``data/gptqmodel/make.py`` made the files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import open_checkpoint
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.formats.awq import Awq
from nybble.loaders.formats.gptq import Gptq
from nybble.loaders.shards import Shards

FILES = Path(__file__).parent / "data" / "gptqmodel"
GPTQ = (
    *("v1", "v2", "act_order", "dynamic", "lm_head"),
    *("int8_words", "int16_words", "int64_words"),
)
AWQ = ("awq", "awq_sym", "awq_gemv")


@pytest.mark.parametrize("name", [*GPTQ, *AWQ])
def test_every_weight_is_the_one_that_the_package_dequantizes(name: str, tmp_path: Path) -> None:
    """GPTQ: groups of 16 and 32, both formats, act-order, every width of codes and words, a
    quantized output layer. AWQ: GEMM with zero points and without, GEMV; scales in both dtypes."""
    folder = Path(shutil.copytree(FILES / name, tmp_path / name))
    expected = load_file(folder / "expected.safetensors")
    (folder / "expected.safetensors").unlink()
    stored = load_file(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    format, shards = checkpoint.quantization, Shards(folder)
    assert isinstance(format, Awq if name in AWQ else Gptq)
    weights = dict(checkpoint.weights())
    assert isinstance(weights.get("lm_head"), PackedWeight) == (name == "lm_head")
    assert len(expected) == {"dynamic": 6, "lm_head": 8}.get(name, 7)
    assert all(torch.isfinite(w).all() for w in weights.values() if isinstance(w, torch.Tensor))
    for module, weight in expected.items():
        found = checkpoint.projection(shards, module)
        assert isinstance(found, PackedWeight)
        # Theirs are rounded to the scales' 16 bits.
        assert torch.equal(found.dequantize().to(weight.dtype), weight), module
        for leaf, tensor in format.tensors(module, format.quantized(shards, module)).items():
            assert torch.equal(tensor, stored[leaf]), leaf


@pytest.mark.parametrize("name", GPTQ)
def test_act_order_alone_permutes_the_inputs(name: str) -> None:
    checkpoint = open_checkpoint(FILES / name)
    assert isinstance(checkpoint, FolderCheckpoint)
    found = checkpoint.projection(Shards(FILES / name), "model.layers.0.self_attn.q_proj")
    assert isinstance(found, PackedWeight)
    ordered = {"act_order", "int64_words"}  # codes of 8 bits become two digits, with an order
    assert (found.perm is not None) == (name in {*ordered, "int16_words"})


def test_dynamic_leaves_out_a_module_and_gives_others_another_width() -> None:
    folder = FILES / "dynamic"
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    format = checkpoint.quantization
    assert isinstance(format, Gptq)
    kept = checkpoint.projection(Shards(folder), "model.layers.0.self_attn.k_proj")
    assert isinstance(kept, DenseWeight)
    expected = load_file(folder / "expected.safetensors")
    widths = {module.rpartition(".")[2]: format.for_module(module).bits for module in expected}
    assert widths == {
        **dict.fromkeys(("q_proj", "v_proj", "o_proj"), 4),
        **{"gate_proj": 8, "down_proj": 2, "up_proj": 3},
    }
