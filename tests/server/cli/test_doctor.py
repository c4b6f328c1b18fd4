"""``nybble doctor`` finds what would keep a model from being served, without loading it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from nybble.engine import Engine, EngineConfig
from nybble.engine.memory import container_bytes, gib
from nybble.loaders import open_checkpoint
from nybble.loaders.footprint import weight_bytes
from nybble.server.cli.doctor import Finding, Plan, examine
from nybble.server.cli.main import app

CONFIG = EngineConfig(device="cpu", max_num_seqs=4, max_model_len=100)
# Of the tiny model: 2 layers of keys and values for 2 heads of 32, 2 bytes each.
KV_TOKEN = 2 * 2 * 2 * 32 * 2


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *(str(argument) for argument in arguments)])


def findings(plan: Plan | None, free: int = 1 << 40) -> dict[str, Finding]:
    return {found.subject: found for found in examine("cpu", plan, memory=lambda _: free)}


def test_a_sound_machine_and_a_model_that_fits(tiny_model: Callable[..., Path]) -> None:
    result = doctor("--model", tiny_model(), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"torch {torch.__version__}" in result.stdout
    assert "qwen2, 16 bits, up to 512 tokens" in result.stdout
    # `serve` computes 64 sequences at most, which fill less than its 1 GiB.
    assert "KV cache 16.0 MiB (32,768 tokens; a sequence may have 512)" in result.stdout
    assert ": fits" in result.stdout


def test_the_machine_is_examined_without_a_model_too() -> None:
    result = doctor("--device", "cpu")
    assert result.exit_code == 0, result.output
    for subject in ("versions", "CPU", "GPU", "device", "CPU kernels", "cache"):
        assert f"│ {subject} " in result.stdout
    assert "memory" not in result.stdout


@pytest.mark.parametrize("asked", [None, 8 * KV_TOKEN * 16], ids=["auto", "kv-cache-memory"])
@pytest.mark.parametrize("context", [None, 100])
@pytest.mark.parametrize("family", ["qwen2", "mistral", "lfm2"])
def test_the_kv_cache_is_the_one_that_serve_takes(
    tiny_model: Callable[..., Path], family: str, context: int | None, asked: int | None
) -> None:
    window = {"sliding_window": 24} if family == "mistral" else {}
    folder = tiny_model(family=family, **window)
    config = replace(CONFIG, max_model_len=context, kv_cache_bytes=asked)
    engine = Engine.load(open_checkpoint(folder), config, False)
    tokens = engine.stats().kv_blocks_total * config.block_size
    told = findings(Plan(str(folder), config, needed=1))["memory"].text
    assert f"({tokens:,} tokens; a sequence may have {engine.max_model_len:,})" in told


def test_a_model_fits_as_long_as_weights_and_kv_cache_do(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model()
    weights = weight_bytes(folder, torch.bfloat16)
    kv = 4 * 7 * 16 * KV_TOKEN  # 4 sequences of 7 blocks
    plan = Plan(str(folder), CONFIG)
    assert findings(plan, free=weights + kv)["memory"].state == "ok"
    short = findings(plan, free=weights + kv - 1)["memory"]
    assert short.state == "broken"
    assert short.text.endswith(f"does not fit; --kv-cache-memory {kv - 1} would")
    none = findings(plan, free=weights)["memory"]
    assert none.text.endswith("does not fit, not even the weights")


def test_a_draft_model_has_to_fit_too(tiny_model: Callable[..., Path]) -> None:
    folder, draft = tiny_model(), tiny_model(seed=1, layers=1)
    weights = weight_bytes(folder, torch.bfloat16) + weight_bytes(draft, torch.bfloat16)
    kv = 4 * 7 * 16 * (KV_TOKEN + KV_TOKEN // 2)
    plan = Plan(str(folder), CONFIG, draft=str(draft))
    assert findings(plan, free=weights + kv)["memory"].state == "ok"
    assert findings(plan, free=weights + kv - 1)["memory"].state == "broken"
    rounded = findings(replace(plan, draft_quantize="nf4"), free=weights + kv - 1)
    assert rounded["memory"].state == "ok"
    engine = Engine.load(
        open_checkpoint(folder),
        replace(CONFIG, speculate="draft", kv_cache_bytes=1 << 20),
        False,
        draft=open_checkpoint(draft),
    )
    tokens = engine.stats().kv_blocks_total * CONFIG.block_size
    told = findings(replace(plan, config=replace(CONFIG, kv_cache_bytes=1 << 20)))["memory"].text
    assert f"({tokens:,} tokens; " in told
    result = doctor("--model", folder, "--draft-model", draft, "--device", "cpu")
    assert result.exit_code == 0
    assert "draft model" in result.stdout
    result = doctor(
        *("--model", folder, "--device", "cpu"), "--draft-model", tiny_model(family="lfm2")
    )
    assert result.exit_code == 1
    assert "cannot be taken back" in result.stdout


def test_an_mtp_head_has_to_fit_too(tiny_mtp: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_mtp.write_tiny_mtp(folder, "glm4_moe")
    result = doctor("--model", folder, "--speculate", "mtp", "--device", "cpu")
    assert result.exit_code == 0
    assert "MTP head" in result.stdout
    plan = Plan(str(folder), replace(CONFIG, speculate="mtp"), quantize="nf4")
    alone = replace(plan, config=CONFIG)
    with_head, without = (findings(each)["memory"].text for each in (plan, alone))
    assert with_head != without
    stored = load_file(folder / "model.safetensors")
    stored = {name: each for name, each in stored.items() if "layers.2." not in name}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert findings(alone)["model"].state == "ok"
    missing = findings(plan)["model"]
    assert missing.state == "broken"
    assert "has no MTP head" in missing.text


def test_more_sequences_than_the_cache_holds_wait(tiny_model: Callable[..., Path]) -> None:
    """`serve` computes 64 at most, and starts with memory for fewer."""
    config = replace(CONFIG, kv_cache_bytes=3 * 7 * 16 * KV_TOKEN)
    plan = Plan(str(tiny_model()), config, needed=1)
    found = findings(plan)["memory"]
    assert found.state == "ok"
    assert found.text.endswith(": fits; 3 sequences of 100 tokens at once, the others wait")
    asked = findings(replace(plan, needed=4))["memory"]
    assert asked.state == "broken"
    enough = 4 * 7 * 16 * KV_TOKEN
    assert asked.text.endswith(
        f"has room for 3 sequences of 100 tokens; 4 need --kv-cache-memory {enough}"
    )
    larger = replace(config, kv_cache_bytes=enough)
    assert findings(Plan(str(tiny_model()), larger, needed=4))["memory"].state == "ok"


def test_states_of_sequences_have_to_fit_too(tiny_model: Callable[..., Path]) -> None:
    """A convolution of LFM2 keeps two rows of its 128 channels for each sequence."""
    folder = tiny_model(family="lfm2")
    plan = Plan(str(folder), replace(CONFIG, kv_cache_bytes=8 << 10), needed=1)
    told = findings(plan)["memory"].text
    of_blocks = 16 * KV_TOKEN // 2  # one of the two layers has keys and values
    states = 2 * 2 * 128
    # 4 running sequences and what they leave behind, which is more than an eighth of 8 KiB.
    slots = 4
    blocks = ((8 << 10) - slots * states) // of_blocks
    assert f"KV cache {gib(blocks * of_blocks + slots * states)} ({16 * blocks} tokens" in told


def test_of_a_sliding_window_the_part_that_is_kept_has_to_fit(
    tiny_model: Callable[..., Path],
) -> None:
    # 4 sequences of 24 + 64 − 1 tokens, in 7 blocks; they may have 512 tokens.
    kept = 4 * 7 * 16 * KV_TOKEN
    config = replace(CONFIG, max_model_len=512, max_batched_tokens=64, kv_cache_bytes=kept)
    folder = str(tiny_model(family="mistral", sliding_window=24))
    assert findings(Plan(folder, config))["memory"].state == "ok"
    less = replace(config, kv_cache_bytes=kept - 1)
    assert findings(Plan(folder, less))["memory"].state == "broken"


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
        (("--max-num-seqs", 10**9), "1000000000 need --kv-cache-memory"),
        (("--kv-cache-memory", 100), "the KV cache of 100 bytes holds no block"),
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
