"""A model's name leads to a folder, or the error says what was tried and what would work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from nybble.loaders import ModelNotFoundError, resolve, resolve_model


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> list[tuple[str, bool]]:
    """A hub that holds ``org/cached`` in its cache and ``org/online`` on its server."""
    asked: list[tuple[str, bool]] = []

    def snapshot_download(name: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append((name, local_files_only))
        if name == "org/cached" or (name == "org/online" and not local_files_only):
            return str(tiny_model())
        raise LocalEntryNotFoundError("cannot find it")

    monkeypatch.setattr(resolve, "snapshot_download", snapshot_download)
    return asked


@pytest.fixture
def aliases(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    file = tmp_path / "models.toml"
    file.write_text(f'llama-13b-gptq = "{tiny_model()}"\nshort = "org/cached"\nlost = "/nowhere"\n')
    return file


def test_a_folder_is_itself(tiny_model: Callable[..., Path]) -> None:
    assert resolve_model(str(tiny_model())) == tiny_model()


def test_an_alias_leads_to_a_folder_or_a_hub_name(
    aliases: Path, tiny_model: Callable[..., Path]
) -> None:
    assert resolve_model("llama-13b-gptq", aliases=aliases) == tiny_model()
    assert resolve_model("short", aliases=aliases) == tiny_model()


def test_the_cache_of_the_hub_is_asked_before_its_server(
    hub: list[tuple[str, bool]], tiny_model: Callable[..., Path]
) -> None:
    assert resolve_model("org/cached") == tiny_model()
    assert hub == [("org/cached", True)]
    hub.clear()
    assert resolve_model("org/online") == tiny_model()
    assert hub == [("org/online", True), ("org/online", False)]


def test_an_unknown_name_lists_what_was_tried_and_what_would_work(aliases: Path) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        resolve_model("org/nothing", aliases=aliases)
    message = str(error.value)
    for part in ("the folder org/nothing", str(aliases), "the hub model org/nothing", "'demo'"):
        assert part in message
    with pytest.raises(ModelNotFoundError, match="the folder /nowhere"):
        resolve_model("lost", aliases=aliases)


def test_a_folder_without_a_config_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json in it"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("content", ["not toml", "model = 3"])
def test_an_alias_file_that_makes_no_sense_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    with pytest.raises(ModelNotFoundError, match=r"bad\.toml"):
        resolve_model("anything", aliases=file)
