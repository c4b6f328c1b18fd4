"""auto-round checkpoints: files that its own layers packed, against what these compute with.

``data/auto_round/make.py`` made the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.kernels import PackedWeight
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.formats import Settings
from nybble.loaders.formats.auto_round import AutoRound
from nybble.loaders.shards import Shards

MODULES = ("mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj")
FILES = Path(__file__).parent / "data" / "auto_round"


def opened(folder: Path) -> tuple[FolderCheckpoint, AutoRound]:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    assert isinstance(checkpoint.quantization, AutoRound)
    return checkpoint, checkpoint.quantization


@pytest.mark.parametrize("packing", ["auto_gptq", "gptqmodel", "auto_awq"])
def test_every_weight_equals_the_package_s_own(packing: str) -> None:
    checkpoint, format = opened(FILES / packing)
    shards, expected = Shards(FILES / packing), load_file(FILES / packing / "expected.safetensors")
    assert len(expected) == 3
    checkpoint.check(shards)
    for name, weight in expected.items():
        found = checkpoint.projection(shards, name)
        assert isinstance(found, PackedWeight)
        # Its layers multiply in half precision, on a unit matrix.
        torch.testing.assert_close(found.dequantize(), weight, rtol=2**-10, atol=1e-6)
    widths = [format.for_module(f"model.layers.0.{name}").bits for name in MODULES]
    assert widths == ([4, 4, 4] if packing == "auto_awq" else [8, 4, 2])


@pytest.mark.parametrize("packing", ["auto_gptq", "gptqmodel", "auto_awq"])
def test_what_is_written_is_what_the_package_wrote(packing: str) -> None:
    _, format = opened(FILES / packing)
    shards, stored = Shards(FILES / packing), load_file(FILES / packing / "model.safetensors")
    for name in load_file(FILES / packing / "expected.safetensors"):
        written = format.tensors(name, format.quantized(shards, name))
        assert all(
            torch.equal(written[n], tensor)
            for n, tensor in stored.items()
            if n.startswith(name + ".")
        )


def test_a_name_comes_before_patterns_and_the_first_pattern_before_others() -> None:
    extra = {"a.*": {"bits": 2}, "b": {"group_size": 32}, "a.b": {"bits": 8}, "c": {"bits": 16}}
    format = AutoRound.from_settings(Settings({"extra_config": extra}, "config.json"))
    found = {name: format.for_module(name) for name in ("a.b", "a.c", "x.b", "x.c", "d")}
    assert {name: (of.bits, of.group_size) for name, of in found.items()} == {
        "a.b": (8, 128),
        "a.c": (2, 128),
        "x.b": (4, 32),
        "x.c": (4, 128),
        "d": (4, 128),
    }
    kept = AutoRound.from_settings(
        Settings(format.with_16_bits(["a.b"], ["a.c"]).settings, "config.json")
    )
    assert kept.settings["extra_config"]["a.b"] == {"bits": 16}
    assert kept.settings["extra_config"]["a.*"] == {"bits": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"packing_format": "auto_round:exllamav2"}, "packing_format is 'auto_round:exllamav2'"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp', expected int"),
        ({"act_bits": 8}, "act_bits is 8, expected 16: quantized activations"),
        ({"rotation_config": {"r": 1}}, "rotations are not supported"),
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, "bits is 8, expected 4"),
        ({"extra_config": {"(": {}}}, r"extra_config.\( is not a regular expression"),
        ({"extra_config": {"a": 8}}, "extra_config.a is 8, expected an object"),
    ],
)
def test_what_is_not_supported_is_refused_by_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        AutoRound.from_settings(Settings(given, "config.json"))
