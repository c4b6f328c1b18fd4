"""What belongs to a model travels with it, in subfolders too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.loaders import open_checkpoint, save_packed
from nybble.loaders.model_files import side_files
from nybble.quantizers import InFlight, quantize_checkpoint

BELONGS = {
    "modules.json": json.dumps(
        [
            {"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        ]
    ),
    "1_Pooling/config.json": json.dumps({"pooling_mode_mean_tokens": True}),
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "weights of its own",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "LICENSE": "text",
}
DOES_NOT = (
    ".gitattributes",
    ".cache/huggingface/x.json",
    "original/consolidated.00.pth",
    "quantize_config.json",
    "origin.json",
    "pytorch_model.bin.index.json",
)


@pytest.fixture
def model(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    for name, content in {**BELONGS, **dict.fromkeys(DOES_NOT, "{}")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "quantize_config.json").unlink()  # would make it a quantized model
    return folder


def pack(source: Path, target: Path) -> None:
    save_packed(open_checkpoint(source), target, layout="rows", progress=False)


def pack_rounded(source: Path, target: Path) -> None:
    save_packed(
        InFlight(open_checkpoint(source), layers="nf4"), target, layout="rows", progress=False
    )


def quantize(source: Path, target: Path) -> None:
    quantize_checkpoint(source, target, format="awq", group_size=32, progress=False)


@pytest.mark.parametrize("write", [pack, pack_rounded, quantize])
def test_a_written_model_has_everything_that_is_not_weights(
    tmp_path: Path, model: Path, write: Callable[[Path, Path], None]
) -> None:
    write(model, tmp_path / "out")
    for name, content in BELONGS.items():
        assert (tmp_path / "out" / name).read_text() == content
    for name in DOES_NOT:
        assert not (tmp_path / "out" / name).exists()
    # And once more, from what was written: nothing is lost or gained on the way.
    assert side_files(tmp_path / "out") == side_files(model)


def test_settings_of_other_weights_stay_behind(tmp_path: Path, model: Path) -> None:
    (model / "quantize_config.json").write_text("{}")
    assert Path("quantize_config.json") not in side_files(model)


def test_a_large_file_is_not_taken_for_a_part_of_the_model(model: Path) -> None:
    with (model / "recording.wav").open("wb") as file:
        file.truncate(129 << 20)  # without contents on the disk
    assert Path("recording.wav") not in side_files(model)
