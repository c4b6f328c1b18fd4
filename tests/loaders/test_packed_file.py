"""The saved packed form is the same model, mapped rather than copied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.layout import CodeKind, Layout, from_rows
from nybble.loaders import CheckpointError, open_checkpoint, save_packed
from nybble.loaders.inspect import inspect_checkpoint
from nybble.loaders.packed_file import VERSION, PackedCheckpoint
from nybble.quantizers import InFlight, quantize_checkpoint


def values(weight: PackedWeight | DenseWeight | Tensor) -> list[Tensor | None]:
    if isinstance(weight, Tensor):
        return [weight]
    if isinstance(weight, DenseWeight):
        return [weight.weight, weight.bias]
    return [weight.dequantize(), weight.bias]


@pytest.mark.parametrize("format", ["gptq", "awq", "nf4"])
@pytest.mark.parametrize("layout", ["rows", "cpu_tiles", "gpu_tiles", "gpu_gated_tiles"])
def test_packing_keeps_every_value(
    tmp_path: Path, tiny_model: Callable[..., Path], format: str, layout: str
) -> None:
    quantize_checkpoint(
        tiny_model(),
        tmp_path / "q",
        format=format,
        group_size=64,
        progress=False,  # type: ignore[arg-type]
    )
    original = open_checkpoint(tmp_path / "q")
    save_packed(original, tmp_path / "p", layout=layout, progress=False)  # type: ignore[arg-type]
    packed = dict(open_checkpoint(tmp_path / "p").weights())
    for name, weight in original.weights():
        for before, after in zip(values(weight), values(packed[name]), strict=True):
            assert before is None or torch.equal(before, after)  # type: ignore[arg-type]
    assert (tmp_path / "p" / "tokenizer.json").is_file()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are listed by Linux")
def test_tensors_of_a_file_share_a_mapping(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself, those of a large mixture are more than Linux allows a process."""
    monkeypatch.setattr("nybble.loaders.packed_file._SHARD_BYTES", 1 << 16)
    source = InFlight(open_checkpoint(tiny_model()), layers="nf4")
    save_packed(source, tmp_path / "p", layout="rows", progress=False)
    files = len(list((tmp_path / "p").glob("*.safetensors")))
    weights = dict(open_checkpoint(tmp_path / "p").weights())
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert 1 < files < len(weights)
    # A private and a writable mapping may lie side by side in two lines.
    assert files <= sum(str(tmp_path) in line for line in lines) <= 2 * files
    assert all(values(weight)[0] is not None for weight in weights.values())


@pytest.mark.parametrize("format", ["gptq", "awq", "nf4"])
def test_rounding_stays_within_half_a_step(
    tmp_path: Path, tiny_model: Callable[..., Path], format: str
) -> None:
    source = tiny_model()
    quantize_checkpoint(source, tmp_path / "q", format=format, group_size=64, progress=False)  # type: ignore[arg-type]
    original = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    weight = dict(open_checkpoint(tmp_path / "q").weights())[name]
    assert isinstance(weight, PackedWeight)
    step = weight.scales.float().amax() * weight.levels.diff().amax()
    # A group's far end may round to the next code beyond the last: one more half step.
    error = (weight.dequantize() - original[name + ".weight"].float()).abs().amax()
    assert 0 < error <= step


def test_transformers_loads_the_nf4_checkpoint_we_write(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    source = tiny_model()
    quantize_checkpoint(source, tmp_path / "q", format="nf4", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    theirs = model.model.layers[0].mlp.down_proj.weight
    ours = dict(open_checkpoint(tmp_path / "q").weights())["model.layers.0.mlp.down_proj"]
    assert isinstance(ours, PackedWeight)
    expected = dequantize_4bit(theirs.data, theirs.quant_state).float()
    assert torch.equal(ours.dequantize(torch.bfloat16).float(), expected)
    # And the codes are those bitsandbytes itself would have chosen.
    original = load_file(source / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    codes, state = quantize_4bit(original.float(), quant_type="nf4")
    assert torch.equal(codes.flatten(), theirs.data.flatten())
    assert torch.equal(state.absmax, theirs.quant_state.absmax)


def test_inspection_counts_bits(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="gptq", group_size=32, progress=False)
    rows = {row.name: row for row in inspect_checkpoint(open_checkpoint(tmp_path / "q"))}
    row = rows["model.layers.0.mlp.down_proj"]
    # 4 bits of code, and a float16 scale and zero for 32 of them; the levels are the rest.
    assert row.bits_per_weight == pytest.approx(5, abs=0.05)
    assert row.group_size == 32
    assert rows["model.embed_tokens.weight"].bits_per_weight == 16


def test_a_newer_version_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    save_packed(open_checkpoint(tiny_model()), tmp_path / "p", layout="rows", progress=False)
    header = json.loads((tmp_path / "p" / "nybble.json").read_text())
    (tmp_path / "p" / "nybble.json").write_text(json.dumps(header | {"version": 99}))
    with pytest.raises(CheckpointError, match=f"has version 99, expected {VERSION}: pack it again"):
        open_checkpoint(tmp_path / "p")


def test_quantizing_twice_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="awq", progress=False)
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_checkpoint(tmp_path / "q", tmp_path / "r", format="awq", progress=False)
    with pytest.raises(FileExistsError, match="is not empty"):
        quantize_checkpoint(tiny_model(), tmp_path / "q", format="awq", progress=False)


def spoil_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "nybble.json"
        header = json.loads(path.read_text())
        change(header["modules"])
        path.write_text(json.dumps(header))

    return spoil


def spoil_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return spoil


SHARD, HEADER, PROJECTION = (
    "packed-00000.safetensors",
    "nybble.json",
    "model.layers.0.mlp.down_proj",
)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_bytes(SHARD, lambda data: data[:-1]),
        spoil_bytes(SHARD, lambda data: data + b"x"),
        spoil_bytes(SHARD, lambda data: bytes(64) + data[64:]),
        spoil_bytes(SHARD, lambda data: b""),
        spoil_bytes(SHARD, lambda data: data.replace(b"down_proj|scales", b"down_proj|scalex")),
        spoil_bytes(SHARD, lambda data: data.replace(b"down_proj|zeros", b"down_proj|zerox")),
        spoil_bytes(HEADER, lambda data: data[: len(data) // 2]),
        spoil_bytes(HEADER, lambda data: b"\xff" + data),
        spoil_bytes(HEADER, lambda data: b"[]"),
        spoil_bytes(HEADER, lambda data: b"[" * 100_000),
        spoil_header(lambda modules: modules.clear()),
        spoil_header(lambda modules: modules.pop(PROJECTION)),
        spoil_header(lambda modules: modules.update({PROJECTION: "x"})),
        spoil_header(lambda modules: modules[PROJECTION].update(kind="other")),
        lambda folder: (folder / SHARD).unlink(),
    ],
)
def test_what_is_damaged_is_found_by_looking_at_headers_alone(
    tmp_path: Path, tiny_model: Callable[..., Path], spoil: Callable[[Path], None]
) -> None:
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="gptq", group_size=32, progress=False)
    save_packed(open_checkpoint(tmp_path / "q"), tmp_path / "p", layout="rows", progress=False)
    PackedCheckpoint(tmp_path / "p").check()
    spoil(tmp_path / "p")
    with pytest.raises(CheckpointError):
        PackedCheckpoint(tmp_path / "p").check()
    with pytest.raises(CheckpointError):
        dict(open_checkpoint(tmp_path / "p").weights())


@pytest.mark.parametrize(
    "change",
    [{"out_features": 7}, {"layout": "cpu_tiles"}, {"extra": 1}, {"levels": list(range(16))}],
)
def test_a_header_that_contradicts_its_tensors_is_named(
    tmp_path: Path, tiny_model: Callable[..., Path], change: dict[str, Any]
) -> None:
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="gptq", group_size=32, progress=False)
    save_packed(open_checkpoint(tmp_path / "q"), tmp_path / "p", layout="rows", progress=False)
    spoil_header(lambda modules: modules[PROJECTION].update(change))(tmp_path / "p")
    with pytest.raises(CheckpointError, match=rf"nybble\.json: {PROJECTION}: "):
        dict(open_checkpoint(tmp_path / "p").weights())


@pytest.mark.parametrize("feature", ["before the first", "after the last"])
def test_a_column_of_a_feature_there_is_not_is_named(
    tmp_path: Path, tiny_model: Callable[..., Path], feature: str
) -> None:
    # An 8-bit weight is stored as two planes of columns, each of which names its feature.
    options = {"format": "gptq", "bits": 8, "group_size": 32, "progress": False}
    quantize_checkpoint(tiny_model(), tmp_path / "q", **options)  # type: ignore[arg-type]
    save_packed(open_checkpoint(tmp_path / "q"), tmp_path / "p", layout="rows", progress=False)
    tensors = load_file(tmp_path / "p" / SHARD)
    perms = [name for name in tensors if name.endswith("|perm")]
    assert perms
    for name in perms:
        tensors[name][5] = -1 if feature == "before the first" else len(tensors[name]) // 2
    save_file(tensors, tmp_path / "p" / SHARD)
    with pytest.raises(CheckpointError, match=r"nybble\.json: .*: perm goes from "):
        dict(open_checkpoint(tmp_path / "p").weights())


def test_a_folder_gets_its_name_once_all_of_it_is_on_the_disk(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()

    def fsync(descriptor: int) -> None:
        assert not (tmp_path / "p").exists()
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr("nybble.loaders.packed_file.os.fsync", fsync)
    save_packed(open_checkpoint(tiny_model()), tmp_path / "p", layout="rows", progress=False)
    assert synced == {"p.partial", *(path.name for path in (tmp_path / "p").iterdir())}


@pytest.mark.parametrize(
    ("layout", "kind", "digest"),
    [
        ("cpu_tiles", "integer", "444a4b2343f61646"),
        ("gpu_tiles", "integer", "b73943ee2720220b"),
        ("gpu_gated_tiles", "integer", "c4d9e363d9bbdb76"),
        ("gpu_tiles", "codebook", "e5a73ae09c4f4794"),
        ("gpu_tiles", "e2m1", "d33797256f83d6b0"),
    ],
)
def test_what_a_version_stores_of_the_same_codes(
    layout: Layout, kind: CodeKind, digest: str
) -> None:
    """If a digest changes, files in the cache would be misread: raise VERSION with it."""
    assert VERSION == 3
    qweight = ((torch.arange(128 * 64) * 2654435761) >> 7).to(torch.uint8).view(128, 64)
    stored, _, _ = from_rows(layout, qweight, torch.ones(128, 1), None, kind)
    assert hashlib.sha256(stored.contiguous().numpy().tobytes()).hexdigest()[:16] == digest
