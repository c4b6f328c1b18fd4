"""The command line: what it prints, and one line for everything expected to go wrong."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from nybble.loaders import open_checkpoint
from nybble.loaders.inspect import WeightSummary
from nybble.model_name import ModelNotFoundError
from nybble.server.api.response_store import ResponseStore
from nybble.server.cli.inspect_table import print_table
from nybble.server.cli.main import app
from nybble.server.cli.model_path import require_model
from nybble.server.lifecycle.options import parse_bytes


def nybble(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_quantize_pack_and_inspect_follow_each_other(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    gptq, packed = tmp_path / "gptq", tmp_path / "packed"
    options = ("--format", "gptq", "--group-size", 32, "--round")
    assert nybble("quantize", *options, tiny_model(), gptq).exit_code == 0
    assert open_checkpoint(gptq).format == "gptq"
    assert nybble("pack", gptq, packed).exit_code == 0
    assert open_checkpoint(packed).format == "packed"
    for folder in (gptq, packed):
        table = nybble("inspect", folder).stdout
        (row,) = (line for line in table.splitlines() if "qkv_proj" in line)
        # 2 layers; 4 bits and, per 32 inputs, a 16-bit scale and zero, and a bias per output.
        assert [cell.strip() for cell in row.strip("│ ").split("│")][:6] == [
            "model.layers.*.self_attn.qkv_proj",
            "2",
            "uint4 with zeros",
            "256×128",
            "32",
            row.split("│")[6].strip(),
        ]
        assert 5 <= float(row.split("│")[6]) < 5.3
        assert "total" in table
    assert "model.layers.1.self_attn.qkv_proj" in nybble("inspect", "--all", gptq).stdout


def test_experts_are_one_row_for_each_of_their_weights(capsys: pytest.CaptureFixture[str]) -> None:
    names = (
        f"model.layers.{layer}.mlp.experts.{expert}.{part}"
        for layer in range(2)
        for expert in range(12)
        for part in ("gate_up_proj", "down_proj")
    )
    weights = [WeightSummary(name, "int4", (8, 8), 8, 64) for name in names]
    for every, layers, count in ((False, ["*"], "24"), (True, ["0", "1"], "12")):
        print_table(weights, every=every)
        rows = [line for line in capsys.readouterr().out.splitlines() if ".experts." in line]
        assert [[cell.strip() for cell in row.strip("│ ").split("│")][:2] for row in rows] == [
            [f"model.layers.{layer}.mlp.experts.*.{part}", count]
            for layer in layers
            for part in ("gate_up_proj", "down_proj")
        ]


@pytest.mark.parametrize("format", ["awq", "nf4", "fp4"])
def test_quantize_writes_the_other_formats(
    tiny_model: Callable[..., Path], tmp_path: Path, format: str
) -> None:
    target = tmp_path / format
    options = ("--format", format, "--group-size", 64, *(["--round"] if format == "awq" else []))
    assert nybble("quantize", *options, tiny_model(), target).exit_code == 0
    assert open_checkpoint(target).format == format


@pytest.mark.parametrize(
    "arguments", [("quantize", "--format", "gptq"), ("quantize", "--format", "awq"), ("merge",)]
)
def test_a_target_with_content_is_refused_before_any_work(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    (tmp_path / "precious").write_text("x")

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    # First what imports the other: it would take the replacement, and keep it for later tests.
    for module in ("server.cli.merge_report", "quantizers.corpus"):
        monkeypatch.setattr(f"nybble.{module}.text_tokens", begun)
    adapter = ("adapter",) if arguments == ("merge",) else ()
    result = nybble(*arguments, tiny_model(), *adapter, tmp_path)
    assert (result.exit_code, result.stderr) == (1, f"error: {tmp_path} is not empty\n")


def test_expected_errors_are_one_line_and_exit_code_1(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    empty = tmp_path / "empty"
    empty.mkdir()
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    model = tiny_model()
    too_many_sequences = ("--kv-cache-memory", "9TiB", "--max-num-seqs", 10**7)
    too_many_sequences += ("--max-batched-tokens", 10**7)
    too_many_slots = ("--enable-lora", "--max-loras", 10**9, "--max-lora-rank", 256)
    cases = [
        (("inspect", "no-such-model"), "no-such-model"),
        (("inspect", empty), "no config.json"),
        (("pack", model, full), f"{full} is not empty"),
        (("pack", model, full / "precious"), "precious is a file, expected a folder to write"),
        (("quantize", "--format", "nf4", model, full), "not empty"),
        (
            ("quantize", "--format", "gptq", "--round", "--group-size", 48, model, tmp_path / "x"),
            "groups of",
        ),
        (("quantize", "--format", "nf4", "--desc-act", model, tmp_path / "x"), "--desc-act"),
        (("quantize", "--format", "awq", "--round", "--text", __file__, model, empty), "--text"),
        (("finetune", model, tmp_path / "absent.jsonl", tmp_path / "x"), "cannot be read"),
        (("quantize", "--format", "awq", "--sym", model, tmp_path / "x"), "--sym"),
        (("quantize", "--format", "gptq", "--group-size", 0, model, tmp_path / "x"), "group-size"),
        (("serve", "--model", "no-such-model", "--port", 0), "no-such-model"),
        (("serve", tmp_path / "absent.gguf", "--port", 0), f"there is no {tmp_path}/absent.gguf"),
        (("serve", tmp_path / "emty" / "x", "--port", 0), f"did you mean {tmp_path / 'empty'}?"),
        (("serve", gguf, "--port", 0), "truncated or not GGUF"),
        (("serve", model / "config.json", "--port", 0), f"give its folder, {model}"),
        (("serve", model, "--port", 0, "--host", "192.0.2.1"), "--host '192.0.2.1' is not"),
        (("serve", "--model", model, "--port", 0, "--max-model-len", 10**6), "--max-model-len is"),
        (("serve", "--model", model, "--port", 0, "--kv-cache-memory", "1KiB"), "KV cache"),
        (("serve", "--model", model, "--port", 0, "--max-batched-tokens", 2), "--max-num-seqs 64"),
        (("serve", "--model", model, "--port", 0, "--kv-cache-dtype", "fp8"), "--kv-cache-dtype"),
        (("serve", "--model", model, "--port", 0, *too_many_sequences), ". A KV cache of "),
        (
            ("serve", "--model", model, "--port", 0, *too_many_sequences),
            "GiB asked for, all that 10000000 sequences at full length can fill) does not fit",
        ),
        (("serve", "--model", model, "--port", 0, *too_many_slots), "memory of cpu ran out"),
        (("serve", "--model", model, "--host", "no.such.host.invalid"), "no.such.host"),
        (("serve", model, "--batches", "--state-dir", full / "precious" / "x"), "--state-dir"),
    ]
    for arguments, expected in cases:
        result = nybble(*arguments)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.exit_code, len(lines)) == (1, 1), (arguments, result.output)
        assert expected in lines[0]
        assert "Traceback" not in result.output
    assert (full / "precious").read_text() == "x"


def test_a_file_which_is_not_in_utf_8_is_named(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    latin, out, model, adapter = tmp_path / "latin", tmp_path / "out", tiny_model(), tiny_adapter()
    latin.write_bytes("größer".encode("latin-1"))
    own_template = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    template = own_template / "chat_template.jinja"
    template.write_bytes(latin.read_bytes())
    index = Path(shutil.copytree(model, tmp_path / "model")) / "model.safetensors.index.json"
    index.write_bytes(latin.read_bytes())
    cases: list[tuple[Path, tuple[object, ...]]] = [
        (latin, ("quantize", "--format", "gptq", "--text", latin, model, out)),
        (latin, ("eval", model, model, "--text", latin)),
        (latin, ("merge", model, adapter, out, "--text", latin)),
        (latin, ("merge", model, adapter, out, "--calibration", latin, "--out", "gptq")),
        (latin, ("eval-adapter", model, adapter, "--text", latin)),
        (latin, ("inspect", "x", "--aliases", latin)),
        (index, ("inspect", index.parent)),
        (template, ("serve", model, "--port", 0, "--lora-modules", f"x={own_template}")),
    ]
    for file, arguments in cases:
        result = nybble(*arguments)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.exit_code, len(lines)) == (1, 1), (arguments, result.output)
        assert str(file) in lines[0], arguments


def test_what_options_name_is_looked_at_before_the_model_is_loaded(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr("nybble.server.lifecycle.launch.prepare_checkpoint", begun)
    file, latin, absent = tmp_path / "file", tmp_path / "latin.jinja", tmp_path / "absent"
    file.write_text("x" * 4096)
    latin.write_bytes(b"\xff")
    config, requests = tmp_path / "config.toml", tmp_path / "in.jsonl"
    config.write_text(f"lora-modules = ['x={absent}/adapter']")
    requests.write_text("{}")
    used = tmp_path / "used.db"
    keys = tmp_path / "tenants.toml"
    keys.write_text("[tenants]")
    in_use = ResponseStore(used, 1 << 20)
    model = tiny_model()
    cases = [
        (("--lora-modules", f"x={tmp_path}/ab/adapter"), f"there is no {tmp_path}/ab"),
        (("--lora-modules", f"x={tmp_path}"), "has no adapter_config.json"),
        (("--config", config), f"--lora-modules: adapter '{absent}/adapter': there is no {absent}"),
        (("--merge-adapter", absent), f"--merge-adapter: adapter '{absent}': there is no {absent}"),
        (("--draft-model", absent), f"model '{absent}': there is no {absent}"),
        (("--chat-template", latin), f"the chat template {latin} is not a text in UTF-8"),
        (("--lora-source", absent), f"--lora-source '{absent}': there is no folder {absent}"),
        (("--response-store", file / "x.db"), f"--response-store: {file} cannot be made"),
        (("--response-store", file), "cannot be used: file is not a database"),
        (("--response-store", used), "is in use by another server"),
        (("--lora-cache-dir", file / "x", "--lora-source", tmp_path), "--lora-cache-dir: "),
        (("--lora-state", file / "x" / "y"), "--lora-state: "),
        (("--otlp-endpoint", "localhost:4318"), "--otlp-endpoint is 'localhost:4318'"),
        (("--ssl-certfile", file), "--ssl-certfile: no certificate"),
        (("--tenants", keys, "--quota-store", "http://x"), "--quota-store http://x"),
    ]
    commands = [(("serve", model, "--port", 0, *options), said) for options, said in cases]
    out = absent / "out.jsonl"
    commands.append((("batch", requests, out, "--model", model), f"there is no folder {absent}"))
    try:
        for arguments, expected in commands:
            result = nybble(*arguments)
            lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert (result.exit_code, len(lines)) == (1, 1), (arguments, result.output)
            assert expected in lines[0], arguments
    finally:
        in_use.close()


def test_an_adapter_that_does_not_fit_is_found_out_before_the_model_is_loaded(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr("nybble.server.lifecycle.launch.Engine.load", begun)
    wide, other = tiny_adapter(r=16), tiny_model(layers=1)
    for model, options, said in (
        (tiny_model(), ("--max-lora-rank", 8), f"{wide} has rank 16"),
        (other, (), "adapter_model.safetensors"),
    ):
        result = nybble("serve", model, "--port", 0, "--lora-modules", f"x={wide}", *options)
        assert result.exit_code == 1, result.output
        assert said in result.stderr


def test_threads_are_as_many_as_asked_for(tmp_path: Path) -> None:
    """Also if the environment says otherwise: -t is what users of llama.cpp write."""
    code = (
        "import os, sys\n"
        "from nybble.server.cli.commands import batch, serve\n"
        "from nybble.server.cli.main import app\n"
        "from nybble.server.cli.threads import use_threads\n"
        "def use_and_end(count): use_threads(count); sys.exit()\n"
        "def run(module, *arguments):\n"
        "    os.environ['OMP_NUM_THREADS'] = '2'\n"
        "    module.use_threads, module.require_named = use_and_end, lambda options: None\n"
        "    try: app([*arguments, '-t', '1'])\n"
        "    except SystemExit: print(os.environ['OMP_NUM_THREADS'], 'torch' in sys.modules)\n"
        "run(serve, 'serve', 'x')\n"
        "run(batch, 'batch', 'in', 'out', '--model', 'x')\n"
        "import torch; print(torch.get_num_threads())"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout == "1 False\n1 False\n1\n", result.stderr


def test_an_alias_file_which_is_not_there_was_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "models.toml"
    monkeypatch.setattr("nybble.server.cli.model_path.DEFAULT_ALIASES", file)
    assert "an alias in" not in nybble("serve", "no-such-model", "--port", 0).stderr
    file.write_text("")
    assert f"an alias in {file}" in nybble("serve", "no-such-model", "--port", 0).stderr


def test_wrong_usage_is_exit_code_2() -> None:
    refused = nybble("serve", "x", "--quantize", "nf5").stderr
    assert "'--quantize': 'nf5' is not one of 'nf4'" in refused
    assert nybble("serve").exit_code == 2
    assert nybble("serve", "--model", "x", "--port", 70000).exit_code == 2
    for option in ("--kv-cache-memory", "--lora-host-memory", "--max-file-size", "--file-quota"):
        result = nybble("serve", "--model", "x", option, "lots")
        assert result.exit_code == 2
        assert f"Invalid value for '{option}'" in " ".join(result.stderr.replace("│", " ").split())


def test_the_model_may_be_said_by_name_alone() -> None:
    for arguments, expected in [
        ((), "say which: nybble serve NAME, or --model NAME"),
        (("x", "--model", "y"), "'x' and --model 'y': give one of them"),
        (("x", "y"), "unexpected extra argument"),
        (("x", "--root-path", "llm"), "'llm' is not a path prefix such as /llm"),
    ]:
        result = CliRunner().invoke(app, ["serve", *arguments], prog_name="nybble")
        assert result.exit_code == 2
        assert expected in " ".join(result.stderr.replace("│", " ").split())


# {} is the name.
_WITH_A_MODEL = [
    "serve {}",
    "pack {} OUT",
    "inspect {}",
    "merge {} ADAPTER OUT",
    "eval-adapter {} ADAPTER",
    "quantize {} OUT --format nf4",
    "finetune {} DATA OUT",
    "qat {} DATA OUT",
    "eval {} OTHER",
]


def test_a_wrong_name_is_found_out_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "link").symlink_to(gone := tmp_path / "gone")
    names = {
        f"{tmp_path}/link": f"{tmp_path}/link is a link to {gone}, which does not exist",
        f"{tmp_path}/absent": f"model '{tmp_path}/absent': there is no {tmp_path}/absent",
        f"{tmp_path}/my-modl": f"my-modl; did you mean {tmp_path}/my-model?",
        "dmo": "an alias, or 'demo' would work; did you mean demo?",
        "my-modl": "would work; did you mean my-model?",
    }
    code = (
        "import sys; from nybble.server.cli.main import app\n"
        f"for command in {_WITH_A_MODEL}:\n"
        f"    for name in {list(names)}:\n"
        "        try: app([name if part == '{}' else part for part in command.split()])\n"
        "        except SystemExit as end: assert end.code == 1\n"
        "    heavy = {'torch', 'transformers', 'aiohttp', 'huggingface_hub'} & set(sys.modules)\n"
        "    assert not heavy, (command, heavy)\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    lines = iter(result.stderr.splitlines())
    for command in _WITH_A_MODEL:
        for expected in names.values():
            line = next(lines)
            assert line.startswith("error: model "), (command, line)
            assert line.endswith(expected), (command, line)
    assert list(lines) == []


def test_a_wrong_certificate_and_a_closed_port_are_found_out_before_pytorch_is_imported(
    tmp_path: Path,
) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    (tmp_path / "model").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    commands = {
        "serve model --ssl-certfile cert.pem": "--ssl-certfile: no certificate with its",
        "serve model --ssl-keyfile cert.pem": "--ssl-keyfile goes with --ssl-certfile",
        f"bench --url http://127.0.0.1:{port}/v1": "does not list its models: ClientConnectorError",
    }
    code = (
        "import sys; from nybble.server.cli.main import app\n"
        f"for command in {list(commands)}:\n"
        "    try: app(command.split())\n"
        "    except SystemExit as end: assert end.code == 1\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), command\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    for line, expected in zip(result.stderr.splitlines(), commands.values(), strict=True):
        assert expected in line


def test_an_alias_and_what_may_be_on_the_hub_are_not_found_wrong(tmp_path: Path) -> None:
    aliases = tmp_path / "models.toml"
    aliases.write_text("short = 'org/model'")
    require_model("short", aliases)
    require_model("org/model")
    require_model("demo")
    with pytest.raises(ModelNotFoundError, match=r"models\.toml.*did you mean short\?"):
        require_model("shrt", aliases)


def test_sizes_are_binary_or_decimal() -> None:
    assert parse_bytes("2GiB") == 2 << 30
    assert parse_bytes("500MB") == 500_000_000
    assert parse_bytes("1.5KiB") == 1536
    assert parse_bytes("4096") == 4096
    with pytest.raises(typer.BadParameter):
        parse_bytes("2 gigs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '1000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "passive"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_threads_spin_for_each_other_only_briefly(given: dict[str, str], expected: str) -> None:
    """What OpenMP itself says it read, as torch loads it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    result = subprocess.run(
        [sys.executable, "-c", "import nybble.server.cli.main, torch"],
        env=kept | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert expected in result.stderr
