"""compressed-tensors checkpoints: files that the package wrote, against its own dequantization.

``data/compressed_tensors/make.py`` made the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.footprint import weight_bytes
from nybble.loaders.formats import Settings
from nybble.loaders.formats.compressed_tensors import CompressedTensors, CompressedTensorsFp8
from nybble.loaders.shards import Shards
from nybble.quantizers import quantize_checkpoint

FILES = Path(__file__).parent / "data" / "compressed_tensors"


def opened(folder: Path) -> tuple[FolderCheckpoint, CompressedTensors]:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    assert isinstance(checkpoint.quantization, CompressedTensors)
    return checkpoint, checkpoint.quantization


@pytest.mark.parametrize("kind", ["schemes", "act_order"])
def test_every_weight_equals_the_package_s_own(kind: str) -> None:
    """Symmetric and not, by group and by channel, 4 and 8 bits, in order and not."""
    checkpoint, _ = opened(FILES / kind)
    shards, expected = Shards(FILES / kind), load_file(FILES / kind / "expected.safetensors")
    assert len(expected) == 7
    for name, weight in expected.items():
        found = checkpoint.projection(shards, name)
        assert isinstance(found, PackedWeight)
        assert torch.equal(found.dequantize(weight.dtype), weight), name
        assert (found.perm is not None) == (kind == "act_order" or found.columns > len(weight[0]))


@pytest.mark.parametrize("kind", ["group", "weight", "weight_new"])
def test_files_of_llm_compressor_ordered_by_activation(kind: str, tmp_path: Path) -> None:
    """With ``group`` the file says which group an input is of; with ``weight`` it needs not.
    ``data/compressed_tensors/oneshot.py`` made the files."""
    folder = Path(shutil.copytree(FILES / f"oneshot_{kind}", tmp_path / kind))
    expected = load_file(folder / "expected.safetensors")
    (folder / "expected.safetensors").unlink()
    checkpoint, _ = opened(folder)
    shards = Shards(folder)
    checkpoint.check(shards)
    assert len(expected) == 7
    for name, weight in expected.items():
        assert (name + ".weight_g_idx" in shards) == (kind == "group")
        found = checkpoint.projection(shards, name)
        assert isinstance(found, PackedWeight)
        assert (found.perm is not None) == (kind == "group")
        assert torch.equal(found.dequantize(weight.dtype), weight), name


@pytest.mark.parametrize("kind", ["float", "oneshot_fp8_block"])
def test_fp8_weights_equal_the_package_s_own(kind: str) -> None:
    """Scales by output, by block (with partial ones at the ends) and one a matrix; loaded in 16
    bits. llm-compressor quantized the second model."""
    checkpoint = open_checkpoint(FILES / kind)
    assert isinstance(checkpoint, FolderCheckpoint)
    assert isinstance(checkpoint.quantization, CompressedTensorsFp8)
    shards, expected = Shards(FILES / kind), load_file(FILES / kind / "expected.safetensors")
    checkpoint.check(shards)
    assert len(expected) == 7
    for name, weight in expected.items():
        found = checkpoint.projection(shards, name)
        assert isinstance(found, DenseWeight)
        assert torch.equal(found.weight, weight), name


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        *(("nvfp4", "nvfp4"), ("mxfp4", "mxfp4")),
        *((kind, "int8") for kind in ("int", "naive", "w4a8")),
    ],
)
def test_weights_of_other_numbers_equal_the_package_s_own(
    kind: str, format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """NVFP4 and MXFP4; int8 by output, one a matrix, by group and with zero points; 4 bits in
    bytes, for 8-bit activations. All packed."""
    folder = Path(shutil.copytree(FILES / kind, tmp_path / kind))
    expected = load_file(folder / "expected.safetensors")
    (folder / "expected.safetensors").unlink()
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    assert checkpoint.format == f"compressed-tensors {format}"
    shards, total = Shards(folder), 0
    checkpoint.check(shards)
    assert len(expected) == 7
    for name, weight in expected.items():
        found = checkpoint.projection(shards, name)
        assert isinstance(found, PackedWeight)
        assert torch.equal(found.dequantize(weight.dtype), weight), name
        total += found.nbytes - found.levels.nbytes
    names = ("model.embed_tokens", "lm_head", "model.norm")
    layer = ("input_layernorm", "post_attention_layernorm")
    names += tuple(f"model.layers.0.{norm}" for norm in layer)
    total += sum(shards.read(f"{name}.weight").nbytes for name in names)
    assert weight_bytes(folder, torch.bfloat16) == total
    # W4A8 as W4A16, with a line.
    assert ("input_activations of config_groups are not used" in caplog.text) == (kind == "w4a8")


def test_a_weight_of_4_bit_floats_is_checked(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FILES / "nvfp4", tmp_path / "nvfp4"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for leaf, changed, message in [
        ("weight_scale", lambda t: t[:, :1], "expected \\(48, 2\\) for 32 inputs in groups of 16"),
        ("weight_scale", lambda t: t.float(), "torch.float32 scales, expected"),
        ("weight_global_scale", torch.zeros_like, "a scale is not finite"),
    ]:
        save_file(
            {**tensors, f"{name}.{leaf}": changed(tensors[f"{name}.{leaf}"]).contiguous()},
            folder / "model.safetensors",
        )
        with pytest.raises(CheckpointError, match=message):
            dict(open_checkpoint(folder).weights())


@pytest.mark.parametrize("kind", ["schemes", "act_order"])
def test_what_is_written_is_what_the_package_wrote(kind: str) -> None:
    _, format = opened(FILES / kind)
    shards, stored = Shards(FILES / kind), load_file(FILES / kind / "model.safetensors")
    for name in load_file(FILES / kind / "expected.safetensors"):
        written = format.tensors(name, format.quantized(shards, name))
        assert written.keys() == {n for n in stored if n.startswith(name + ".")}
        assert all(torch.equal(tensor, stored[n]) for n, tensor in written.items())


@pytest.mark.parametrize("kind", ["schemes", "act_order"])
def test_the_size_is_what_loading_takes(kind: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FILES / kind, tmp_path / kind))
    (folder / "expected.safetensors").unlink()
    checkpoint, format = opened(folder)
    shards, total = Shards(folder), 0
    for module in checkpoint.architecture.linears:
        weight = checkpoint.projection(shards, module)
        assert isinstance(weight, PackedWeight)
        total += weight.nbytes - weight.levels.nbytes
    others = [leaves for leaves in shards.modules.values() if not format.owns(leaves)]
    names = [name for leaves in others for leaf, name in leaves.items() if leaf == "weight"]
    total += sum(shards.read(name).nbytes for name in names)
    assert weight_bytes(folder, torch.bfloat16) == total


def test_scales_of_a_quantized_cache_are_passed_over_with_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dict(open_checkpoint(FILES / "schemes").weights())
    assert "model.layers.0.self_attn.k_scale (1) are not used: the KV cache's dtype" in caplog.text


def settings(group: dict[str, Any] | None = None, **more: Any) -> Settings:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    given = {"targets": ["Linear"], "weights": weights | (group or {})}
    return Settings({"config_groups": {"group_0": given}, **more}, "config.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (settings({"num_bits": 3}), "group_0.weights: num_bits is 3, expected 4, 8"),
        (settings({"type": "float"}), "group_0.weights: type is 'float', expected int"),
        (settings({"strategy": "block"}), "strategy is 'block', expected group, channel"),
        (settings({"dynamic": True}), "group_0.weights: dynamic is True, expected false"),
        (settings({"actorder": "random"}), "actorder is 'random', expected null, weight"),
        (settings(format="marlin-24"), "format is 'marlin-24', expected pack-quantized"),
        (
            settings(sparsity_config={"format": "sparse-24-bitmask"}),
            "sparse weights are not supported",
        ),
        (
            settings(transform_config={"config_groups": {"u": {}}}),
            "transforms are not supported",
        ),
        (Settings({"config_groups": {}}, "config.json"), "config_groups is {}, expected groups"),
        (Settings({"config_groups": {"W4A16": ["Linear"]}}, "x"), "W4A16 is .*expected an object"),
    ],
)
def test_what_is_not_supported_is_refused_by_field(given: Settings, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors.from_settings(given)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"num_bits": 4}, "num_bits is 4, expected 8"),
        ({"type": "int"}, "type is 'int', expected float"),
        ({"strategy": "group"}, "strategy is 'group', expected tensor, channel, block"),
        ({"strategy": "block"}, "block_structure is None, expected two integers"),
    ],
)
def test_other_floats_are_refused_by_field(group: dict[str, Any], message: str) -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", **group}
    given = settings(weights, format="float-quantized", quant_method="compressed-tensors")
    assert CompressedTensorsFp8.accepts(given)
    with pytest.raises(CheckpointError, match=message):
        CompressedTensorsFp8.from_settings(given)


def test_a_packed_module_that_no_target_matches_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FILES / "schemes", tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["config_groups"]["channel"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "expected.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj is packed, and no target"):
        dict(open_checkpoint(folder).weights())


@pytest.mark.parametrize(
    "options",
    [{"group_size": 32}, {"group_size": -1, "sym": True}, {"group_size": 64, "bits": 8}],
    ids=str,
)
def test_nybble_quantize_writes_the_weights_that_its_gptq_layout_has(
    tmp_path: Path, tiny_model: Callable[..., Path], options: dict[str, Any]
) -> None:
    tokens = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))
    found = {}
    for format in ("gptq", "compressed-tensors"):
        target = tmp_path / format
        quantize_checkpoint(
            tiny_model(), target, format=format, calibration=tokens, progress=False, **options
        )
        found[format] = dict(open_checkpoint(target).weights())
    for name, weight in found["gptq"].items():
        if isinstance(weight, PackedWeight):
            other = found["compressed-tensors"][name]
            assert isinstance(other, PackedWeight)
            if options.get("sym") or options.get("bits") == 8:
                assert torch.equal(weight.dequantize(), other.dequantize())
            else:  # version 1 of GPTQ's layout keeps zeros away from 0: another grid for few groups
                same = (weight.dequantize() == other.dequantize()).float().mean()
                assert same > 0.5
