"""``nybble doctor`` finds what would keep a model from being served, without loading it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from nybble.engine import Engine, EngineConfig
from nybble.engine.memory import container_bytes
from nybble.loaders import open_checkpoint
from nybble.loaders.footprint import weight_bytes
from nybble.server.cli.doctor import Finding, Plan, examine
from nybble.server.cli.main import app

CONFIG = EngineConfig(device="cpu", max_num_seqs=4, max_model_len=100)


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *(str(argument) for argument in arguments)])


def findings(plan: Plan | None, free: int = 1 << 40) -> dict[str, Finding]:
    return {found.subject: found for found in examine("cpu", plan, memory=lambda _: free)}


def test_a_sound_machine_and_a_model_that_fits(tiny_model: Callable[..., Path]) -> None:
    result = doctor("--model", tiny_model(), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"torch {torch.__version__}" in result.stdout
    assert "qwen2, 16 bits, up to 512 tokens" in result.stdout
    # 8,192 by default, were the model made for so many.
    assert "KV at 512 tokens × 64 sequences" in result.stdout
    assert ": fits" in result.stdout


def test_the_machine_is_examined_without_a_model_too() -> None:
    result = doctor("--device", "cpu")
    assert result.exit_code == 0, result.output
    for subject in ("versions", "CPU", "GPU", "device", "CPU kernels", "cache"):
        assert f"│ {subject} " in result.stdout
    assert "memory" not in result.stdout


def test_a_model_fits_as_long_as_weights_and_kv_cache_do(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model()
    weights = weight_bytes(folder, torch.bfloat16)
    # 4 sequences of 7 blocks; 2 layers of keys and values for 2 heads of 32, 2 bytes each.
    kv = 4 * 7 * 16 * 2 * 2 * 2 * 32 * 2
    engine = Engine.load(open_checkpoint(folder), replace(CONFIG, kv_cache_bytes=kv), False)
    assert engine.stats().kv_blocks_total == 4 * 7
    plan = Plan(str(folder), CONFIG)
    assert findings(plan, free=weights + kv)["memory"].state == "ok"
    short = findings(plan, free=weights + kv - 1)["memory"]
    assert short.state == "broken"
    assert short.text.endswith("does not fit; 3 sequences of that length would")
    none = findings(plan, free=weights)["memory"]
    assert none.text.endswith("does not fit, not even the weights")


def test_sequences_that_nobody_asked_for_may_wait(tiny_model: Callable[..., Path]) -> None:
    """`serve` computes 64 at most, and starts with memory for fewer."""
    folder = tiny_model()
    weights, kv = weight_bytes(folder, torch.bfloat16), 4 * 7 * 16 * 2 * 2 * 2 * 32 * 2
    plan = Plan(str(folder), CONFIG, needed=1)
    found = findings(plan, free=weights + kv - 1)["memory"]
    assert found.state == "ok"
    assert found.text.endswith(": 3 of them fit at once, the others wait")
    assert findings(plan, free=weights + kv // 4 - 1)["memory"].state == "broken"


def test_of_a_sliding_window_the_part_that_is_kept_has_to_fit(
    tiny_model: Callable[..., Path],
) -> None:
    folder = tiny_model(family="mistral", sliding_window=24)
    weights = weight_bytes(folder, torch.bfloat16)
    # 4 sequences of 24 + 64 − 1 tokens, in 7 blocks of 512 numbers; they may have 512 tokens.
    config = replace(CONFIG, max_model_len=512, max_batched_tokens=64)
    kv = 4 * 7 * 16 * 2 * 2 * 2 * 32 * 2
    plan = Plan(str(folder), config)
    assert findings(plan, free=weights + kv)["memory"].state == "ok"
    assert findings(plan, free=weights + kv - 1)["memory"].state == "broken"


def test_rounding_while_loading_makes_a_model_fit(tiny_model: Callable[..., Path]) -> None:
    plan = Plan(str(tiny_model()), replace(CONFIG, max_num_seqs=1, max_model_len=16))
    free = weight_bytes(tiny_model(), torch.bfloat16)
    assert findings(plan, free)["memory"].state == "broken"
    assert findings(replace(plan, quantize="nf4"), free)["memory"].state == "ok"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "org/missing"), "the hub model org/missing (not on this machine)"),
        (("--max-model-len", 100_000), "--max-model-len is 100,000"),
        (("--kv-cache-dtype", "fp8"), "needs a GPU"),
        (("--device", "cuda"), "device is 'cuda', but"),
        (("--max-num-seqs", 10**9), "does not fit"),
    ],
    ids=str,
)
def test_what_is_broken_is_named_and_the_exit_code_is_1(
    tiny_model: Callable[..., Path], options: tuple[object, ...], message: str
) -> None:
    if options[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = doctor("--model", tiny_model(), "--device", "cpu", *options)
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout
    text = " ".join(result.stdout.replace("│", " ").split())  # whatever the table wraps
    assert message in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"quantization_config": {"quant_method": "quip"}}, "quant_method 'quip'"),
    ],
    ids=str,
)
def test_a_model_the_engine_cannot_compute_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    found = findings(Plan(str(folder), CONFIG))["model"]
    assert found.state == "broken"
    assert message in found.text


def test_a_truncated_file_is_found(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    found = findings(Plan(str(folder), CONFIG))["model"]
    assert found.state == "broken"
    assert "truncated" in found.text


def test_without_a_compiler_serving_is_slow_but_sound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing compiled in it
    result = doctor("--device", "cpu")
    assert result.exit_code == 0, result.output
    (row,) = (line for line in result.stdout.splitlines() if "CPU kernels" in line)
    assert "slow" in row


def test_a_cache_that_cannot_be_written_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = findings(None)["cache"]
    assert found.state == "broken"
    assert "set XDG_CACHE_HOME" in found.text


def test_a_containers_limit_counts_and_pages_of_files_do_not(tmp_path: Path) -> None:
    assert container_bytes(tmp_path) >= 1 << 60  # there is no such limit
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 4000\n")
    assert container_bytes(tmp_path) == 7000
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) >= 1 << 60
