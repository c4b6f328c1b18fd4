"""Options and arguments that several commands share, and how their values are read."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from nybble.server.cli.config_file import read_config

# Options by the panel that `--help` shows them in.
model_option = partial(typer.Option, rich_help_panel="Model")
memory_option = partial(typer.Option, rich_help_panel="Memory and batching")

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
# The names that :func:`nybble.loaders.formats.written_formats` has, which is slow to import.
WrittenFormat = Literal["gptq", "awq", "nf4", "fp4", "compressed-tensors"]

ModelArgument = Annotated[str, typer.Argument(help="Model folder, hub name or alias.")]
TargetArgument = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
DataArgument = Annotated[
    Path,
    typer.Argument(help="JSON lines: messages, prompt and completion, or text.", dir_okay=False),
]

AliasesOption = Annotated[
    Path | None,
    model_option(help="TOML file of alias = 'folder or hub name'.", dir_okay=False, exists=True),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of these options by name: port = 8080. Flags win over it.",
        callback=read_config,
        dir_okay=False,
        exists=True,
        is_eager=True,
    ),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], model_option(help="auto: the GPU, if there is one.")
]
DtypeOption = Annotated[Dtype, model_option(help="Of activations and KV cache.")]
QuantizeOption = Annotated[
    Literal["nf4"] | None, model_option(help="Round a 16-bit model to 4 bits while loading.")
]
HeadOption = Annotated[
    Literal["int8"] | None, model_option(help="Round the output layer to 8 bits.")
]
KVCacheDtypeOption = Annotated[
    Literal["auto", "int8", "fp8"],
    memory_option(help="int8 or fp8 halve the KV cache's memory (GPU)."),
]
TextOption = Annotated[
    Path | None,
    typer.Option(help="Plain text (default: Python's own sources).", dir_okay=False, exists=True),
]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{unit}iB": 1 << 10 * (i + 1) for i, unit in enumerate("KMGT")}
_UNITS |= {f"{unit}B": 1000 ** (i + 1) for i, unit in enumerate("KMGT")}


def parse_bytes(text: str) -> int:
    """Bytes of ``2GiB``, ``500MB``, ``1073741824``. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size such as 2GiB, 500MB or 1073741824")
    return int(float(match[1]) * _UNITS[match[2]])


def require_empty(target: Path) -> None:
    """Before any work is done for it. Raises FileExistsError where something is there already."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, expected a folder to write")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")
