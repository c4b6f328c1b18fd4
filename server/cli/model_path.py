"""Checks a model's name before the imports that load the model, which take seconds."""

from __future__ import annotations

import difflib
from pathlib import Path

from nybble.model_name import (
    DEFAULT_ALIASES,
    DEMO,
    ModelNotFoundError,
    may_be_on_the_hub,
    read_aliases,
)


def require_model(model: str, aliases: Path | None = None) -> None:
    """Find out at once that a name leads nowhere, unless only the hub can tell.

    aliases: see :func:`nybble.loaders.resolve_model`, which says more about names that lead to
        something.

    Raises FileNotFoundError for a missing path, and ModelNotFoundError for a missing name. Both
    suggest what is there and has a similar name.
    """
    table = read_aliases(aliases)
    if model in table:
        return
    path = Path(model).expanduser()
    if model == DEMO or path.exists():
        return
    if "/" not in model and not model.startswith("~") and path.suffix != ".gguf":
        tried = [f"the folder {path}"]
        if (file := aliases or DEFAULT_ALIASES).is_file():
            tried.append(f"an alias in {file}")
        here = [each.name for each in Path().iterdir() if each.is_dir()]
        error = ModelNotFoundError.after(model, tried)
        raise ModelNotFoundError(f"{error}{_hint(model, [DEMO, *table, *here])}")
    if may_be_on_the_hub(model) and (":" in model or path.suffix != ".gguf"):
        return
    # The first part of the path that does not exist.
    wrong = next(part for part in (*reversed(path.parents), path) if not part.exists())
    beside = [file.name for file in wrong.parent.iterdir()] if wrong.parent.is_dir() else []
    hint = _hint(wrong.name, beside, wrong.parent)
    raise FileNotFoundError(f"model {model!r}: there is no {wrong}{hint}")


def _hint(name: str, known: list[str], folder: Path | None = None) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if not near:
        return ""
    return f"; did you mean {near[0] if folder is None else folder / near[0]}?"
