"""Checks names of models and adapters before the imports that load them, which take seconds."""

from __future__ import annotations

import difflib
from pathlib import Path

from nybble.model_name import (
    DEFAULT_ALIASES,
    DEMO,
    ModelNotFoundError,
    dangling_link,
    may_be_on_the_hub,
    read_aliases,
)
from nybble.server.lifecycle.named_adapters import named_adapters
from nybble.server.lifecycle.options import ServeOptions


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
    if (link := dangling_link(path)) is not None:
        raise FileNotFoundError(f"model {model!r}: {link}")
    if "/" not in model and not model.startswith("~") and path.suffix != ".gguf":
        tried = [f"the folder {path}"]
        if (file := aliases or DEFAULT_ALIASES).is_file():
            tried.append(f"an alias in {file}")
        here = [each.name for each in Path().iterdir() if each.is_dir()]
        error = ModelNotFoundError.after(model, tried)
        raise ModelNotFoundError(f"{error}{_hint(model, [DEMO, *table, *here])}")
    if may_be_on_the_hub(model) and (":" in model or path.suffix != ".gguf"):
        return
    raise FileNotFoundError(f"model {model!r}: {_missing(path)}")


def require_adapter(adapter: str, named_by: str) -> None:
    """The same of an adapter, which is a folder or on the hub.

    named_by: the option that names it. Raises FileNotFoundError.
    """
    path = Path(adapter).expanduser()
    link = dangling_link(path)
    if path.exists() or (link is None and may_be_on_the_hub(adapter)):
        return
    raise FileNotFoundError(f"{named_by}: adapter {adapter!r}: {link or _missing(path)}")


def require_named(options: ServeOptions) -> None:
    """All models and adapters that a server is told to load at its start.

    Raises what require_model and require_adapter do, and ValueError for adapters whose names or
    form are wrong.
    """
    model, adapters = options.model, options.adapters
    require_model(model.model, model.aliases)
    if model.draft_model is not None:
        require_model(model.draft_model, model.aliases)
    if adapters.merge_adapter is not None:
        require_adapter(adapters.merge_adapter, "--merge-adapter")
    for path in named_adapters(adapters, options.served_names).values():
        require_adapter(path, "--lora-modules")


def _missing(path: Path) -> str:
    """The first part of a path that does not exist, and what may have been meant."""
    wrong = next(part for part in (*reversed(path.parents), path) if not part.exists())
    beside = [file.name for file in wrong.parent.iterdir()] if wrong.parent.is_dir() else []
    return f"there is no {wrong}{_hint(wrong.name, beside, wrong.parent)}"


def _hint(name: str, known: list[str], folder: Path | None = None) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if not near:
        return ""
    return f"; did you mean {near[0] if folder is None else folder / near[0]}?"
