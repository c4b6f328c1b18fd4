"""Where downloaded and converted models are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/nybble``, or ``~/.cache/nybble``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"
