"""What a user's name for a model may mean; imports nothing that takes long."""

from __future__ import annotations

import tomllib
from pathlib import Path

DEFAULT_ALIASES = Path.home() / ".config" / "nybble" / "models.toml"
DEMO = "demo"
DEMO_HUB_NAME = "Qwen/Qwen2.5-Coder-0.5B-Instruct"


class ModelNotFoundError(LookupError):
    """No model has this name; the message lists what was tried and what would work."""

    @classmethod
    def after(cls, name: str, tried: list[str]) -> ModelNotFoundError:
        return cls(
            f"model {name!r} was not found; tried {', '.join(tried)}. A folder with config.json, "
            f"a .gguf file, a hub name such as {DEMO_HUB_NAME}, an alias, or {DEMO!r} would work"
        )


def read_aliases(path: Path | None) -> dict[str, str]:
    """Folders and hub names by alias, from a TOML file; DEFAULT_ALIASES, if it exists, for None.

    Raises ModelNotFoundError for a file that cannot be read.
    """
    file = path or DEFAULT_ALIASES
    if path is None and not file.is_file():
        return {}
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ModelNotFoundError(f"the alias file {file} cannot be read: {error}") from error
    for alias, target in table.items():
        if not isinstance(target, str):
            raise ModelNotFoundError(f"{file}: {alias} is not a string: a folder or a hub name")
    return table


def may_be_on_the_hub(name: str) -> bool:
    """Whether ``name`` has the form ``org/name``."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def dangling_link(path: Path) -> str | None:
    """What is wrong with a path if it, or a folder on the way, is a link to nothing."""
    for part in (*reversed(path.parents), path):
        if part.is_symlink() and not part.exists():
            return f"{part} is a link to {part.readlink()}, which does not exist"
    return None
