"""Checks a model's path before the imports that load it, which take seconds."""

from __future__ import annotations

import difflib
from pathlib import Path


def require_path(model: str) -> None:
    """Raises FileNotFoundError for a missing path, and suggests a similar one.

    Names that may be aliases or hub names are left to :func:`nybble.loaders.resolve_model`.
    """
    if not (model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".gguf")):
        return
    path = Path(model).expanduser()
    if path.exists():
        return
    # The first part of the path that does not exist.
    wrong = next(part for part in (*reversed(path.parents), path) if not part.exists())
    beside = [file.name for file in wrong.parent.iterdir()] if wrong.parent.is_dir() else []
    near = difflib.get_close_matches(wrong.name, beside, n=1)
    hint = f"; did you mean {wrong.parent / near[0]}?" if near else ""
    raise FileNotFoundError(f"--model {model}: there is no {wrong}{hint}")
