"""Packed models that no start will use again are told from the others, and removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from nybble.loaders import open_checkpoint
from nybble.loaders.cache import make_folder
from nybble.quantizers import quantize_checkpoint
from nybble.quantizers.packed_cache import entries, packed_folder
from nybble.quantizers.prepare import demo_form, prepare_checkpoint
from nybble.server.cli.main import app

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def snapshots(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of the hub in two snapshots, of which ``one`` is the newest; both are packed."""
    model = tmp_path / "hub" / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("one")
    quantize_checkpoint(
        tiny_model(), model / "snapshots/one", format="gptq", group_size=32, progress=False
    )
    shutil.copytree(model / "snapshots/one", model / "snapshots/two")
    return model


def packed(source: Path) -> Path:
    return prepare_checkpoint(str(source), device=CPU, progress=False).folder


def cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["cache", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_newer_snapshot_replaces_the_older_ones_packed_form(snapshots: Path) -> None:
    first = packed(snapshots / "snapshots/one")
    assert [(entry.path, entry.stale) for entry in entries()] == [(first, None)]
    (snapshots / "refs/main").write_text("two")
    assert entries()[0].stale == "the hub's cache has a newer snapshot"
    second = packed(snapshots / "snapshots/two")
    assert [(entry.path, entry.stale) for entry in entries()] == [(second, None)]


def test_prune_removes_what_has_gone_or_changed_and_nothing_else(
    snapshots: Path, tmp_path: Path
) -> None:
    kept = packed(snapshots / "snapshots/one")
    gone, changed = tmp_path / "gone", tmp_path / "changed"
    stale = []
    for folder in (gone, changed):
        shutil.copytree(snapshots / "snapshots/one", folder)
        stale.append(packed(folder))
    shutil.rmtree(gone)
    file = changed / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    killed, busy = packed_folder() / "killed.gptq", packed_folder() / "busy.partial"
    killed.mkdir()
    busy.mkdir()
    with FileLock(packed_folder() / "busy.lock"):
        listed = cli("list")
        assert "its model has gone" in listed
        assert "its model or the packed form has changed" in listed
        assert "left half done" in listed
        assert f"kept  {snapshots}/snapshots/one" in listed
        assert "would free" in cli("prune", "--dry-run")
        assert all(path.is_dir() for path in (*stale, killed))
        assert "freed" in cli("prune")
        assert not [path for path in (*stale, killed) if path.exists()]
        assert kept.is_dir()
        assert busy.is_dir()
    assert packed(snapshots / "snapshots/one") == kept
    cli("prune", "--all")
    assert not kept.exists()


def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Not a directory.*: set XDG_CACHE_HOME to a folder"):
        make_folder(tmp_path / "file" / "packed")


def test_an_empty_cache_is_no_error() -> None:
    assert "packed" in cli("list")
    assert "freed 0.0 MiB" in cli("prune")


def test_the_demo_is_inspected_as_it_is_served(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cache/nybble/models/demo"
    shutil.copytree(tiny_model(), folder)
    result = CliRunner().invoke(app, ["inspect", "demo"])
    assert "as it was downloaded: `nybble serve demo` rounds it to 4 bits" in result.stderr
    assert "uint4" not in result.stdout
    form = prepare_checkpoint("demo", device=CPU, progress=False)
    assert demo_form(folder, CPU) == form.folder
    assert open_checkpoint(form.folder).format == "packed"
    result = CliRunner().invoke(app, ["inspect", "demo"])
    assert "as `nybble serve demo` runs it:" in result.stderr
    assert "uint4 with zeros" in result.stdout
