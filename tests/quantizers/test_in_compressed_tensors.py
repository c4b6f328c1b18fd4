"""What we write as compressed-tensors, read by the package: `make test-peers` installs it.

transformers 5.24 cannot load zero points that 0.20.1 of the package has packed, its own files
neither, so modules are decompressed one by one; a whole model is loaded if it is symmetric.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.kernels import PackedWeight
from nybble.loaders import load_adapter, open_checkpoint
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.shards import Shards
from nybble.models import architecture_of
from nybble.quantizers import merge_adapter, quantize_checkpoint
from nybble.quantizers.packed_model import load_packed_model

pytest.importorskip("compressed_tensors", reason="make test-peers runs these")

SYMMETRIC = {"group_size": 32, "sym": True}


@pytest.fixture(params=["quantized", "merged", "kept in 16 bits"])
def write(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
) -> Callable[..., Path]:
    def build(**options: Any) -> Path:
        folder, merged = tmp_path / "q", tmp_path / "merged"
        quantize_checkpoint(
            tiny_model(), folder, format="compressed-tensors", progress=False, **options
        )
        if request.param == "quantized":
            return folder
        architecture = architecture_of(AutoConfig.from_pretrained(tiny_model()))
        adapter = load_adapter(tiny_adapter(target_modules=["q_proj", "up_proj"]), architecture)
        keep = request.param == "kept in 16 bits"
        merge_adapter(folder, adapter, merged, keep_16_bits=keep, progress=False)
        return merged

    return build


@pytest.mark.parametrize(
    "options",
    [SYMMETRIC, {"group_size": 32}, {"group_size": -1}, {"group_size": 32, "bits": 8}],
    ids=str,
)
def test_it_dequantizes_every_module_to_what_we_read(
    write: Callable[..., Path], options: dict[str, Any]
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    folder = write(**options)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(settings)
    schemes = {target: g for g in config.config_groups.values() for target in g.targets}
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    tensors, shards = load_file(folder / "model.safetensors"), Shards(folder)
    for name in checkpoint.architecture.linears:
        ours = checkpoint.projection(shards, name)
        packed = match_targets(name, nn.Linear(1, 1), config.ignore) == []
        assert isinstance(ours, PackedWeight) == packed
        if isinstance(ours, PackedWeight):
            scheme = schemes[match_targets(name, nn.Linear(1, 1), list(schemes))[0]]
            parts = {leaf: tensors[full] for leaf, full in shards.modules[name].items()}
            theirs = BaseCompressor.get_value_from_registry(config.format).decompress(parts, scheme)
            expected = theirs["weight"]
            assert torch.equal(ours.dequantize(expected.dtype), expected)


def test_transformers_finds_the_logits_we_find(write: Callable[..., Path]) -> None:
    folder = write(**SYMMETRIC)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    ours = load_packed_model(
        open_checkpoint(folder), device=torch.device("cpu"), dtype=torch.float32
    )
    tokens = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours(tokens).logits, theirs(tokens).logits
    # Theirs has computed the weights in the scales' float16.
    assert float((found - expected).abs().max()) < 0.02 * float(expected.std())
