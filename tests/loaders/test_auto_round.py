"""auto-round checkpoints: files that its own layers packed, against what these compute with.

``data/auto_round/make.py`` made the files, ``exports.py`` beside it those of whole exports.
"""

from __future__ import annotations

import shutil
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


# What each export is to us, and how many of its seven linear layers are in 16 bits.
EXPORTS = {
    "auto_gptq": ("gptq", 2),
    "auto_gptq_asym": ("gptq", 2),
    "auto_awq": ("awq", 2),
    "mixed": ("auto-round", 3),
    "mixed_gptqmodel": ("auto-round", 3),
    "mixed_awq": ("auto-round", 5),
    "int8": ("compressed-tensors int8", 0),
    "nvfp4": ("compressed-tensors nvfp4", 0),
    "mxfp4": ("compressed-tensors mxfp4", 0),
    "fp8": ("compressed-tensors fp8", 7),  # is dequantized
}


@pytest.mark.parametrize("name", EXPORTS)
def test_its_exports_are_the_weights_of_its_dequantized_export(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of its own format, and of those of GPTQ, AWQ and llm-compressor; all layers alike, or not."""
    format, in_16_bits = EXPORTS[name]
    folder = Path(shutil.copytree(FILES / "exports" / name, tmp_path / name))
    expected = load_file(folder / "expected.safetensors")
    (folder / "expected.safetensors").unlink()
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    assert checkpoint.format == format
    dict(checkpoint.weights())
    assert len(expected) == 7
    shards, dense = Shards(folder), 0
    for module, weight in expected.items():
        found = checkpoint.projection(shards, module)
        dense += not isinstance(found, PackedWeight)
        values = found.dequantize() if isinstance(found, PackedWeight) else found.weight.float()
        # Theirs are rounded to bfloat16, and its scales to float16.
        largest = float(weight.abs().max())
        torch.testing.assert_close(values, weight.float(), rtol=2**-7, atol=largest * 2**-10)
    assert dense == in_16_bits
    quantized = format.startswith("compressed-tensors")
    assert ("input_activations of config_groups are not used" in caplog.text) == quantized


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
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, "bits is 8, expected 4"),
        ({"extra_config": {"(": {}}}, r"extra_config.\( is not a regular expression"),
        ({"extra_config": {"a": 8}}, "extra_config.a is 8, expected an object"),
    ],
)
def test_what_is_not_supported_is_refused_by_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        AutoRound.from_settings(Settings(given, "config.json"))
