"""Arguments and options that several commands share, beside those of ``serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# The names that :func:`nybble.loaders.formats.written_formats` has, which is slow to import.
WrittenFormat = Literal["gptq", "awq", "nf4", "fp4", "compressed-tensors"]

ModelArgument = Annotated[str, typer.Argument(help="Model folder, hub name or alias.")]
TargetArgument = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
DataArgument = Annotated[
    Path,
    typer.Argument(help="JSON lines: messages, prompt and completion, or text.", dir_okay=False),
]
TextOption = Annotated[
    Path | None,
    typer.Option(help="Plain text (default: Python's own sources).", dir_okay=False, exists=True),
]


def require_empty(target: Path) -> None:
    """Before any work is done for it. Raises FileExistsError if something is there already."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, expected a folder to write")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")
