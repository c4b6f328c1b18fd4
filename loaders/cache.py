"""Where downloaded and converted models are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/nybble``, or ``~/.cache/nybble``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


def make_folder(folder: Path) -> None:
    """Make a folder in the cache. Raises ValueError, which says what to do, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the cache's folder {folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME to "
            "a folder that can be written"
        ) from error
