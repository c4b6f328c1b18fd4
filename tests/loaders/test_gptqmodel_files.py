"""GPTQ checkpoints that GPTQModel quantized and saved, against what its own layers compute.

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
from nybble.loaders.formats.gptq import Gptq
from nybble.loaders.shards import Shards

FILES = Path(__file__).parent / "data" / "gptqmodel"


@pytest.mark.parametrize("name", ["v1", "v2", "act_order", "dynamic", "lm_head"])
def test_every_weight_is_what_the_package_s_layers_compute_with(name: str, tmp_path: Path) -> None:
    """Groups of 16 and 32, both formats, act-order, every width, a quantized output layer."""
    folder = Path(shutil.copytree(FILES / name, tmp_path / name))
    expected = load_file(folder / "expected.safetensors")
    (folder / "expected.safetensors").unlink()
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    format, shards = checkpoint.quantization, Shards(folder)
    assert isinstance(format, Gptq)
    weights = dict(checkpoint.weights())
    assert isinstance(weights["lm_head"], PackedWeight) == (name == "lm_head")
    assert len(expected) == {"dynamic": 6, "lm_head": 8}.get(name, 7)
    permuted = set()
    for module, weight in expected.items():
        found = checkpoint.projection(shards, module)
        assert isinstance(found, PackedWeight)
        permuted.add(found.perm is not None and format.for_module(module).bits < 8)
        # Theirs are products with a unit matrix in half precision. A code of 8 bits that is wrong
        # by one would change the weight by 2 / 255 of the largest.
        error = (found.dequantize() - weight.float()).abs().max() / weight.float().abs().max()
        assert float(error) < (1.3 / 255 if format.for_module(module).bits == 8 else 2**-7)
    assert permuted == {name == "act_order"}
    if name == "dynamic":
        kept = checkpoint.projection(shards, "model.layers.0.self_attn.k_proj")
        assert isinstance(kept, DenseWeight)
        widths = {m.rpartition(".")[2]: format.for_module(m).bits for m in expected}
        assert widths == {
            **dict.fromkeys(("q_proj", "v_proj", "o_proj"), 4),
            **{"gate_proj": 8, "down_proj": 2, "up_proj": 3},
        }
    assert all(torch.isfinite(w).all() for w in weights.values() if isinstance(w, torch.Tensor))
