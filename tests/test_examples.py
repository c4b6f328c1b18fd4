"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .server.forked import ForkedServer

EXAMPLES = Path(__file__).parents[1] / "examples"
NYBBLE = "from nybble.server.cli.main import main; main()"


def example(name: str, *arguments: object, path: Path | None = None) -> str:
    """Run an example as a user does; returns what it prints."""
    command = [EXAMPLES / name] if name.endswith(".sh") else [sys.executable, "-P", EXAMPLES / name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    run = set(re.findall(r'example\("([\w.]+)"', Path(__file__).read_text(encoding="utf-8")))
    assert run == {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".sh")}


def test_offline(tiny_model: Callable[..., Path]) -> None:
    said = example("offline.py", tiny_model())
    assert len(re.findall(r"^'.+' → ['\"].*['\"] \((?:stop|length)\)$", said, re.MULTILINE)) == 3
    assert re.search(r"^log probability: -\d", said, re.MULTILINE)


@pytest.mark.slow
def test_adapters(tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]) -> None:
    adapters = [tiny_adapter(seed=1), tiny_adapter(seed=2)]
    said = example("adapters.py", tiny_model(), *adapters)
    base, *adapted = re.split(r"^(?:base model|/.+?): ", said, flags=re.MULTILINE)[1:]
    assert len(adapted) == 2
    assert len({base, *adapted}) == 3


def test_openai_client(tiny_model: Callable[..., Path]) -> None:
    arguments = ["serve", "--model", str(tiny_model()), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = ForkedServer([*arguments, "--kv-cache-memory", "16MiB"], environment)
    try:
        lines = iter(server.stderr.readline, "")
        url = next(match[0] for line in lines if (match := re.search(r"http://\S+/v1$", line)))
        said = example("openai_client.py", url)
    finally:
        server.kill()
        server.wait()
    # What a random model says within the grammar may have line breaks, and may be cut off.
    assert re.search(r'^\{\s*"name"\s*:', said, re.MULTILINE)
    assert said.splitlines()[-1] == "2 vectors of 128 numbers"


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for the PATH with ``nybble`` in it, which `make install` puts beside Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "nybble"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -P -c '{NYBBLE}' \"$@\"\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.slow
def test_finetune(tiny_model: Callable[..., Path], tmp_path: Path, commands: Path) -> None:
    data = tmp_path / "data.jsonl"
    row = {"prompt": "the quick brown", "completion": " fox jumps"}
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    out = tmp_path / "out"
    options = ("--max-steps", 2, "--max-length", 64, "--rank", 4, "--device", "cpu")
    said = example("finetune.sh", tiny_model(), data, out, *options, path=commands)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "merged" / "config.json").is_file()
    assert "q_proj" in said or "qkv_proj" in said
