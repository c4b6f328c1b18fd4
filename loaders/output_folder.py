"""Folders that commands write: whole or not at all, and known to be writable before the work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` if the ``with`` block raises nothing.

    What ``target`` has is replaced then, and kept otherwise. Raises OSError if the folder, which is
    beside it, cannot be made.
    """
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with _called(target):
            scratch.mkdir(parents=True)
        yield scratch
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    finally:  # also if the disk is full, or Ctrl-C is pressed, only now
        shutil.rmtree(scratch, ignore_errors=True)


def make_writable(folder: Path) -> None:
    """Make a folder that a long work will write to. Raises OSError if it cannot be written."""
    with _called(folder):
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()


@contextmanager
def _called(folder: Path) -> Iterator[None]:
    """Have errors name this folder, not what is made in it or beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}") from error
