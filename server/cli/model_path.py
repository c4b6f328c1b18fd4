"""A model's path is looked at before what opens it is imported, which takes seconds."""

from __future__ import annotations

import difflib
from pathlib import Path


def require_path(model: str) -> None:
    """Raises FileNotFoundError for a path that leads nowhere, with the name that was meant.

    Names that may be an alias or a hub's are left to :func:`nybble.loaders.resolve_model`.
    """
    if not (model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".gguf")):
        return
    path = Path(model).expanduser()
    if path.exists():
        return
    # The part of the path that is wrong: the first that is not there.
    wrong = next(part for part in (*reversed(path.parents), path) if not part.exists())
    beside = [file.name for file in wrong.parent.iterdir()] if wrong.parent.is_dir() else []
    near = difflib.get_close_matches(wrong.name, beside, n=1)
    hint = f"; did you mean {wrong.parent / near[0]}?" if near else ""
    raise FileNotFoundError(f"--model {model}: there is no {wrong}{hint}")
