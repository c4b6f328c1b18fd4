"""A folder is written whole or not at all, and whether it can be is known before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.loaders.output_folder import make_writable, whole_folder


def test_a_whole_folder_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "above" / "model"
    for text in ("first", "second"):
        with whole_folder(target) as folder:
            (folder / text).write_text(text)
            assert not (target / text).exists()
        assert [path.name for path in target.iterdir()] == [text]
    assert list(target.parent.iterdir()) == [target]


def test_what_is_not_whole_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()

    def write(error: BaseException) -> None:
        with whole_folder(target) as folder:
            (folder / "new").touch()
            raise error

    for error in (OSError("the disk is full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write(error)
        assert list(tmp_path.iterdir()) == [target]
        assert [path.name for path in target.iterdir()] == ["old"]


def test_an_error_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "model"
    said = f"^{target} cannot be written: Not a directory$"
    with pytest.raises(OSError, match=said), whole_folder(target):
        pass
    with pytest.raises(OSError, match=said):
        make_writable(target)


def test_a_folder_that_is_there_is_made_sure_of(tmp_path: Path) -> None:
    make_writable(tmp_path / "above" / "model")
    make_writable(tmp_path / "above" / "model")
    assert not list((tmp_path / "above" / "model").iterdir())
