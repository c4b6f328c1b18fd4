"""A quantization_config as tools write it: harmless forms are read, errors name the field."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.formats import (
    FORMATS,
    AffineFormat,
    Format,
    Settings,
    format_of,
    unknown_settings,
    writing_format,
    written_formats,
)
from nybble.loaders.formats.awq import Awq
from nybble.loaders.formats.gptq import Gptq
from nybble.server.cli.options import WrittenFormat


def settings(**given: Any) -> Settings:
    return Settings(given, "config.json")


def folder_with(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("four", [4, "4", 4.0, " 4 "])
@pytest.mark.parametrize("true", [True, "true", "True", 1])
def test_forms_that_can_mean_one_thing_only_are_understood(four: Any, true: Any) -> None:
    found = Gptq.from_settings(settings(bits=four, group_size="32", desc_act=true, sym=None))
    assert (found.bits, found.group_size, found.desc_act, found.sym) == (4, 32, True, False)
    assert Awq.from_settings(settings(w_bit=four, version="GEMV")).gemv


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": "four"}, "config.json: bits is 'four', expected an integer"),
        ({"bits": 4.5}, "config.json: bits is 4.5, expected an integer"),
        ({"bits": True}, "config.json: bits is True, expected an integer"),
        ({"bits": [4]}, r"config.json: bits is \[4\], expected an integer"),
        ({"group_size": 0}, "config.json: group_size is 0, expected -1 or above 0"),
        ({"sym": "maybe"}, "config.json: sym is 'maybe', expected true or false"),
        ({"dynamic": ["x"]}, r"config.json: dynamic is \['x'\], expected an object"),
        ({"dynamic": {"(": {}}}, r"dynamic has '\(', which is not a regular expression"),
        ({"pack_dtype": "int4"}, "pack_dtype is 'int4', expected int32, int8, int16, int64"),
    ],
)
def test_an_error_names_the_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Gptq.from_settings(settings(**given))


@pytest.mark.parametrize(
    ("file", "given", "name"),
    [
        ("quantize_config", {"bits": 4, "group_size": 32, "desc_act": True}, "gptq"),
        ("quant_config", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "awq"),
    ],
)
def test_files_of_older_tools_stand_for_the_config(
    tmp_path: Path, file: str, given: dict[str, Any], name: str
) -> None:
    folder_with(tmp_path, config={}, **{file: given})
    format = format_of(tmp_path)
    assert format is not None
    assert format.name == name
    # The settings are complete: whoever writes them into config.json says what the file said.
    assert format.settings == {"quant_method": name, **given}


def test_an_unknown_method_is_refused_with_the_list_of_known_ones(tmp_path: Path) -> None:
    folder_with(tmp_path, config={"quantization_config": {"quant_method": "quip"}})
    known = "gptq, awq, bitsandbytes, compressed-tensors, auto-round, fp8, hqq"
    with pytest.raises(CheckpointError, match=f"quant_method 'quip' .* supported are {known}"):
        format_of(tmp_path)


SETTINGS: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "auto-round", "bits": 4},
    {"quant_method": "fp8"},
    {"quant_method": "hqq"},
    {"quant_method": "mxfp4"},
    dict(writing_format("compressed-tensors").settings),
]


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_transforms_are_refused_in_every_format(tmp_path: Path, given: dict[str, Any]) -> None:
    """They rotate inputs while the model runs, which nothing here does."""
    for name in ("rotation", "rotation_config", "spinquant_config", "transform_config"):
        for value, sound in ((None, True), ({}, True), ({"config_groups": {"a": 1}}, False)):
            folder_with(tmp_path, config={"quantization_config": given | {name: value}})
            if sound:
                format_of(tmp_path)
                continue
            with pytest.raises(CheckpointError, match=rf"{name} is .*, expected none: .*transform"):
                format_of(tmp_path)


@pytest.mark.parametrize(
    ("method", "table"), [("gptq", "dynamic"), ("auto-round", "extra_config")], ids=str
)
def test_a_modules_own_transform_is_refused_and_its_unknown_settings_are_told_of(
    tmp_path: Path, method: str, table: str
) -> None:
    config = {"quant_method": method, "bits": 4}
    own: dict[str, Any] = {"bits": 8, "permuted": "rows"}
    folder_with(tmp_path, config={"quantization_config": config | {table: {".*up_proj": own}}})
    format = format_of(tmp_path)
    assert format is not None
    assert unknown_settings(format.settings) == ["permuted"]
    own["rotation"] = "hadamard"
    folder_with(tmp_path, config={"quantization_config": config | {table: {".*up_proj": own}}})
    with pytest.raises(CheckpointError, match=rf"{table} '.\*up_proj': rotation is 'hadamard'"):
        format_of(tmp_path)


def test_an_unknown_setting_is_told_of_once(
    tmp_path: Path, tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    from nybble.quantizers import quantize_checkpoint

    folder = tmp_path / "gptq"
    quantize_checkpoint(tiny_model(), folder, format="gptq", group_size=64, progress=False)
    config = json.loads((folder / "config.json").read_text())
    list(open_checkpoint(folder).weights())
    assert not caplog.records
    config["quantization_config"] |= {"permuted": "rows", "shuffled": None, "damp_percent": 0.1}
    folder_with(folder, config=config)
    list(open_checkpoint(folder).weights())
    (record,) = caplog.records
    assert f"{folder}: the quantization settings have permuted, which is not" in record.getMessage()


def test_what_the_tools_have_written_is_known() -> None:
    """Of the checkpoints in data/, which the tools have made."""
    found = 0
    for path in (Path(__file__).parent / "data").rglob("config.json"):
        format = format_of(path.parent)
        if format is not None:
            assert unknown_settings(format.settings) == [], path
            found += 1
    assert found > 20


def test_the_command_line_offers_what_can_be_written() -> None:
    from typing import get_args

    assert list(get_args(WrittenFormat)) == written_formats()
    with pytest.raises(ValueError, match="format 'quip' is not known; known are gptq, awq"):
        writing_format("quip")


@pytest.mark.parametrize("name", written_formats())
def test_what_is_written_says_what_it_is(name: str, tmp_path: Path) -> None:
    written = writing_format(name)
    folder_with(tmp_path, config={"quantization_config": dict(written.settings)})
    assert format_of(tmp_path) == written


@pytest.mark.parametrize(
    "command", ["pack", "inspect", "quantize", "merge", "eval", "finetune", "qat", "doctor"]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are"),
        ({"model_type": "no-such"}, "model_type 'no-such' is not supported; supported are"),
        (
            {"quantization_config": {"quant_method": "quip"}},
            "quant_method 'quip' is not supported; supported are",
        ),
    ],
)
def test_every_command_refuses_what_is_unknown_by_name(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    command: str,
    change: dict[str, Any],
    message: str,
) -> None:
    from typer.testing import CliRunner

    from nybble.server.cli.main import app

    folder = Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    folder_with(folder, config=config | change)
    target = tmp_path / "out"
    arguments = {
        "pack": [folder, target],
        "inspect": [folder],
        "quantize": [folder, target, "--format", "nf4"],
        "merge": [folder, tmp_path / "adapter", target],
        "eval": [tiny_model(), folder],
        "finetune": [folder, tmp_path / "data.jsonl", target],
        "qat": [folder, tmp_path / "data.jsonl", target],
        "doctor": ["--model", folder],
    }[command]
    result = CliRunner().invoke(app, [command, *map(str, arguments)], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert message in " ".join(re.sub("│", " ", result.output + result.stderr).split())
    assert not target.exists()


STRANGE: list[Any] = [
    *(None, True, -1, 0, 3, 2**70, 0.5, float("inf"), float("nan")),
    *(
        "",
        "x",
        "nan",
        "1e400",
        "(",
        [],
        [None],
        [[]],
        {},
        {"": 1},
        {"(": {}},
        {"a": {"weights": 1}},
    ),
    {"a": {"weights": {"num_bits": []}, "targets": [1]}},
    {"a": {"weights": {"type": "int"}, "targets": ["re:("]}},
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.__name__)
def test_strange_values_bring_no_other_error(format: type[Format]) -> None:
    """Whatever a config.json holds, the error is one that callers expect."""
    common = {"quant_method": format.quant_method, "load_in_4bit": True}
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}
    for field in (
        *("bits", "w_bit", "group_size", "sym", "desc_act", "dynamic", "checkpoint_format"),
        *(
            "version",
            "zero_point",
            "bnb_4bit_quant_type",
            "config_groups",
            "format",
            "extra_config",
        ),
        *("packing_format", "act_bits", "weight_block_size", "fmt", "quant_config", "load_in_4bit"),
        *("sparsity_config", "transform_config", "pack_dtype"),
    ):
        for value in STRANGE:
            given = {**common, "config_groups": groups, field: value}
            with suppress(CheckpointError):
                format.accepts(Settings(given, "config.json"))
            with suppress(CheckpointError):
                found = format.from_settings(Settings(given, "config.json"))
                if isinstance(found, AffineFormat):
                    found.for_module("model.layers.0.mlp.up_proj")
