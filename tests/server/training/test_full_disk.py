"""A disk that is full in the middle of something: told as such, and nothing is left behind."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from nybble.server.files import files as module
from nybble.server.files.database import Database
from nybble.server.files.files import Files, StoredFile
from nybble.server.http.errors import as_api_error
from nybble.server.training.examples import count_examples

LINE = b'{"text": "the quick brown fox"}\n'


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path)
    yield database
    database.close()


@pytest.fixture
def files(database: Database, tmp_path: Path) -> Files:
    limits = {"max_file_bytes": 1 << 20, "quota_bytes": 1 << 30}
    return Files(tmp_path / "files", database, **limits, checks={"fine-tune": count_examples})


def upload(files: Files, name: str) -> StoredFile:
    with files.upload("acme") as arriving:
        arriving.write(LINE)
        return files.add(arriving, filename=name, purpose="fine-tune", owner="acme")


def fill(database: Database) -> None:
    """Let it grow by no page more."""
    ((pages,),) = database.rows("PRAGMA page_count")
    database.rows(f"PRAGMA max_page_count = {pages}")


def test_a_database_that_cannot_grow_is_told_as_a_full_disk_and_the_file_is_gone(
    database: Database, files: Files, tmp_path: Path
) -> None:
    kept = upload(files, "kept")
    fill(database)
    with pytest.raises(sqlite3.OperationalError) as full:
        upload(files, "x" * 100_000)
    assert as_api_error(full.value, "id").status == 507
    with pytest.raises(sqlite3.OperationalError):
        files.add_result(b"result", filename="x" * 100_000, owner="acme")
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.id]
    assert files.totals() == (1, len(LINE))
    database.rows("PRAGMA max_page_count = 100000")  # room again
    assert files.get(upload(files, "y" * 100_000).id, "acme").bytes == len(LINE)
    assert files.totals() == (2, 2 * len(LINE))


def test_a_result_that_cannot_be_written_leaves_nothing(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.add_result(b"result", filename="results", owner="acme")
    with pytest.raises(OSError, match="No space"):
        upload(files, "data")
    assert list((tmp_path / "files").iterdir()) == []
    monkeypatch.undo()
    upload(files, "data")


def test_a_transaction_that_the_full_disk_has_ended_does_not_hide_why(
    database: Database,
) -> None:
    def end_and_fail() -> None:
        with database.transaction() as connection:
            connection.execute("ROLLBACK")  # as SQLite itself does for some errors
            raise sqlite3.OperationalError("database or disk is full")

    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            end_and_fail()
