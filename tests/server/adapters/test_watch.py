"""A watched folder: adapters come, change and go with their subfolders."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nybble.engine import AdapterConfig, Engine
from nybble.loaders import open_checkpoint
from nybble.server.adapters.watch import AdapterWatch

from ..conftest import CONFIG


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=8))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()
    yield engine
    engine.stop()


def test_adapters_follow_their_folders(
    engine: Engine, tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    watch = AdapterWatch(engine, tmp_path, ("tiny",))
    shutil.copytree(tiny_adapter(seed=1), tmp_path / "a")
    watch.scan()
    assert engine.adapters() == [], "it may still be being written"
    watch.scan()
    (info,) = engine.adapters()
    assert info.name == "a"
    shutil.copytree(tiny_adapter(seed=2), tmp_path / "a", dirs_exist_ok=True)
    watch.scan()
    watch.scan()
    (changed,) = engine.adapters()
    assert changed.version != info.version
    shutil.rmtree(tmp_path / "a")
    watch.scan()
    assert engine.adapters() == []


def test_what_cannot_be_loaded_is_said_once_and_tried_again_when_it_changes(
    engine: Engine,
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = AdapterWatch(engine, tmp_path, ("tiny",))
    shutil.copytree(tiny_adapter(r=16), tmp_path / "wide")
    shutil.copytree(tiny_adapter(seed=1), tmp_path / "tiny")
    shutil.copytree(tiny_adapter(seed=1), tmp_path / "a name")
    (tmp_path / "no adapter").mkdir()
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            watch.scan()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "adapter a name cannot be loaded",
        "adapter tiny cannot be loaded",
        "adapter wide cannot be loaded",
    ]
    shutil.copytree(tiny_adapter(seed=1), tmp_path / "wide", dirs_exist_ok=True)
    watch.scan()
    watch.scan()
    assert [info.name for info in engine.adapters()] == ["wide"]


def test_adapters_loaded_by_hand_are_left_alone(
    engine: Engine, tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    mine = engine.load_adapter("a", str(tiny_adapter(seed=1)))
    shutil.copytree(tiny_adapter(seed=2), tmp_path / "a")
    watch = AdapterWatch(engine, tmp_path, ())
    for _ in range(3):
        watch.scan()
    shutil.rmtree(tmp_path / "a")
    watch.scan()
    assert [info.version for info in engine.adapters()] == [mine.version]


def test_one_folder_that_fails_as_nobody_foresaw_ends_no_watch(
    engine: Engine,
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = engine.load_adapter

    def fail_for_one(name: str, path: str, *, replace: bool) -> object:
        if name == "a":
            raise RuntimeError("unforeseen")
        return load(name, path, replace=replace)

    monkeypatch.setattr(engine, "load_adapter", fail_for_one)
    watch = AdapterWatch(engine, tmp_path, ("tiny",))
    for name in ("a", "b"):
        shutil.copytree(tiny_adapter(seed=1), tmp_path / name)
    for _ in range(3):
        watch.scan()
    assert [info.name for info in engine.adapters()] == ["b"]
