"""What can be wrong with a checkpoint or an adapter."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_POINTER = b"version https://git-lfs.github.com/spec/"


class CheckpointError(ValueError):
    """A checkpoint cannot be read: the message names the file or tensor and what was expected."""


class AdapterError(CheckpointError):
    """An adapter cannot be used with this base: the message names the setting or tensor."""


def unreadable(path: Path, why: str) -> str:
    """What an error says of a file: that it is a pointer of git-lfs, or else ``why``."""
    return f"{path} {pointer(path) or why}"


def pointer(path: Path) -> str | None:
    """What is wrong with a file that is a git-lfs pointer; None for any other."""
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return "is a git-lfs pointer, not the file itself: run git lfs pull in its folder"
    return None
