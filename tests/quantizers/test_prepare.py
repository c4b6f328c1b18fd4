"""A model is packed once, and again only when it has changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.matmul import preferred_layout
from nybble.loaders import Checkpoint, load_adapter, open_checkpoint
from nybble.models import architecture_of
from nybble.quantizers import prepare, quantize_checkpoint
from nybble.quantizers.prepare import prepare_checkpoint, rounded_parts

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nybble"


@pytest.fixture
def gptq(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "gptq"
    quantize_checkpoint(tiny_model(), folder, format="gptq", group_size=32, progress=False)
    return folder


def opened(name: object) -> Checkpoint:
    return prepare_checkpoint(str(name), device=CPU, progress=False)


def packed_weights(checkpoint: Checkpoint) -> list[PackedWeight]:
    return [weight for _, weight in checkpoint.weights() if isinstance(weight, PackedWeight)]


def head_and_layers(checkpoint: Checkpoint) -> list[PackedWeight]:
    weights = sorted(checkpoint.weights(), key=lambda item: item[0] != "lm_head")
    return [weight for _, weight in weights if isinstance(weight, PackedWeight)]


def test_a_quantized_model_is_packed_once_for_this_machine(
    gptq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(gptq)
    assert first.format == "packed"
    assert {weight.layout for weight in packed_weights(first)} == {preferred_layout(CPU)}
    monkeypatch.setattr(prepare, "save_packed", None)
    assert opened(gptq).folder == first.folder


def test_a_changed_model_is_packed_anew_and_the_old_form_removed(gptq: Path) -> None:
    first = opened(gptq)
    packed = first.folder.parent
    (packed / "killed.gptq").mkdir()
    (packed / "busy.partial").mkdir()
    file = gptq / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with FileLock(packed / "busy.lock"):
        other = prepare_checkpoint(str(gptq), device=CPU, head="int8", progress=False)
        second = opened(gptq)
    assert second.folder != first.folder
    folders = {path for path in packed.iterdir() if path.is_dir()}
    assert folders == {second.folder, other.folder, packed / "busy.partial"}


def test_a_change_in_a_subfolder_is_a_change_of_the_model(gptq: Path) -> None:
    first = opened(gptq)
    (gptq / "1_Pooling").mkdir()
    (gptq / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    second = opened(gptq)
    assert second.folder != first.folder
    assert (second.folder / "1_Pooling" / "config.json").is_file()


def test_settings_in_a_file_of_their_own_are_a_part_of_the_model(gptq: Path) -> None:
    config = json.loads((gptq / "config.json").read_text())
    settings = config.pop("quantization_config")
    (gptq / "config.json").write_text(json.dumps(config))
    (gptq / "quantize_config.json").write_text(json.dumps({**settings, "desc_act": True}))
    first = opened(gptq)
    (gptq / "quantize_config.json").write_text(json.dumps(settings))
    assert opened(gptq).folder != first.folder


@pytest.mark.parametrize("damage", ["truncated", "missing", "header", "tensor"])
def test_a_damaged_packed_form_is_packed_again(
    gptq: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = opened(gptq).folder
    (shard,) = folder.glob("*.safetensors")
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "missing":
        shard.unlink()
    elif damage == "header":
        (folder / "nybble.json").write_text("{")
    else:
        save_file({"other": torch.zeros(1)}, shard)
    assert len(packed_weights(opened(gptq))) == 8  # of two layers
    assert "is damaged and is packed again" in caplog.text
    caplog.clear()
    opened(gptq)
    assert not caplog.text


def test_files_have_the_permissions_of_any_other(gptq: Path, tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    files = [*gptq.glob("*.safetensors"), *opened(gptq).folder.glob("*.safetensors")]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "any").stat().st_mode}


def test_a_packed_and_a_16_bit_model_are_opened_where_they_are(
    gptq: Path, tiny_model: Callable[..., Path]
) -> None:
    packed = opened(gptq).folder
    assert opened(packed).folder == packed
    assert opened(tiny_model()).folder == tiny_model()


def test_the_demo_is_quantized_first_and_the_intermediate_files_removed(
    tiny_model: Callable[..., Path], cache: Path
) -> None:
    shutil.copytree(tiny_model(), cache / "models" / "demo")
    checkpoint = opened("demo")
    head, *layers = head_and_layers(checkpoint)
    assert {weight.group_size for weight in layers} == {64}
    assert all(weight.zeros is not None for weight in layers)
    assert head.columns == 2 * head.in_features  # 8 bits
    assert [path.name for path in (cache / "packed").iterdir() if path.is_dir()] == [
        checkpoint.folder.name
    ]


def test_a_16_bit_model_can_be_rounded_on_the_way(tiny_model: Callable[..., Path]) -> None:
    checkpoint = prepare_checkpoint(
        str(tiny_model()), device=CPU, quantize="nf4", head="int8", progress=False
    )
    head, *layers = head_and_layers(checkpoint)
    assert {weight.group_size for weight in layers} == {64}
    assert head.columns == 2 * head.in_features
    with pytest.raises(ValueError, match="is packed already"):
        prepare_checkpoint(str(checkpoint.folder), device=CPU, head="int8")


@pytest.mark.parametrize(
    ("quantize", "hidden", "bits"), [("nf4", 128, 8), ("nf4", 192, 16), (None, 128, 16)]
)
def test_an_output_layer_is_kept_in_8_bits_beside_layers_in_4(
    quantize: Literal["nf4"] | None, hidden: int, bits: int, tiny_model: Callable[..., Path]
) -> None:
    """If its inputs are whole groups; that of a 16-bit model stays as it is."""
    model = str(tiny_model(hidden_size=hidden))
    options: dict[str, Any] = {"device": CPU, "quantize": quantize, "progress": False}
    found = prepare_checkpoint(model, head="auto", **options)
    head = dict(found.weights()).get("lm_head")
    assert (16 if not isinstance(head, PackedWeight) else 8) == bits
    kept = prepare_checkpoint(model, head="16bit", **options)
    assert not isinstance(dict(kept.weights()).get("lm_head"), PackedWeight)
    assert rounded_parts(model, open_checkpoint(Path(model)), quantize, "auto")[1] == (
        "int8" if bits == 8 else None
    )


def test_an_output_layer_beside_gptqs_layers_is_kept_in_8_bits_once_it_is_packed(
    gptq: Path,
) -> None:
    first = prepare_checkpoint(str(gptq), device=CPU, head="auto", progress=False)
    head, *layers = head_and_layers(first)
    assert head.columns == 2 * head.in_features
    assert layers
    again = prepare_checkpoint(str(first.folder), device=CPU, head="auto")
    assert again.folder == first.folder


def test_packing_that_fails_leaves_nothing_that_looks_packed(
    gptq: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = gptq / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        opened(gptq)
    assert not [path for path in (cache / "packed").glob("*") if (path / "nybble.json").exists()]


def test_an_adapter_is_merged_before_packing(
    cache: Path, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    folder, adapter = tiny_model(), str(tiny_adapter(seed=1))

    def merged(**options: object) -> Checkpoint:
        return prepare_checkpoint(  # type: ignore[arg-type]
            str(folder), device=CPU, adapter=adapter, progress=False, **options
        )

    plain = dict(open_checkpoint(folder).weights())["model.layers.0.mlp.down_proj"]
    change = load_adapter(Path(adapter), architecture_of(open_checkpoint(folder).config))
    module = change.modules["model.layers.0.mlp.down_proj"]
    found = dict(merged().weights())["model.layers.0.mlp.down_proj"]
    assert isinstance(plain, DenseWeight)
    assert isinstance(found, DenseWeight)
    expected = (plain.weight.float() + module.scale * module.b @ module.a).bfloat16()
    assert torch.equal(found.weight, expected)
    assert merged().folder == merged().folder
    assert merged(quantize="nf4").folder != merged().folder
    assert not list((cache / "packed").glob("*.merged"))
    with pytest.raises(ValueError, match="is packed already"):
        prepare_checkpoint(str(merged().folder), device=CPU, adapter=adapter)


def test_an_adapter_may_change_no_layer_of_the_decoder(
    cache: Path, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    adapter = str(tiny_adapter(target_modules=["lm_head"]))
    plain = dict(open_checkpoint(tiny_model()).weights())["lm_head"]
    merged = prepare_checkpoint(str(tiny_model()), device=CPU, adapter=adapter, progress=False)
    found = dict(merged.weights())["lm_head"]
    assert isinstance(plain, DenseWeight)
    assert isinstance(found, DenseWeight)
    assert not torch.equal(found.weight, plain.weight)


def test_merging_into_a_4_bit_model_keeps_its_scales(
    gptq: Path, cache: Path, tiny_adapter: Callable[..., Path]
) -> None:
    adapter = str(tiny_adapter(target_modules=["q_proj"]))
    merged = prepare_checkpoint(str(gptq), device=CPU, adapter=adapter, progress=False)
    name = "model.layers.1.self_attn.qkv_proj"
    before, after = (dict(folder.weights())[name] for folder in (opened(gptq), merged))
    assert isinstance(before, PackedWeight)
    assert isinstance(after, PackedWeight)
    assert torch.equal(before.scales, after.scales)
    assert not torch.equal(before.codes(), after.codes())
