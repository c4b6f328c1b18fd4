"""``nybble merge``: folds adapters into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.options import AliasesOption, ModelArgument, TargetArgument


def merge(
    base: ModelArgument,
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders or hub names.")
    ],
    target: TargetArgument,
    out: Annotated[
        Literal["gptq", "awq", "nf4", "fp4", "bf16"] | None,
        typer.Option(help="Layout to write (default: the base's)."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number for each adapter, such as 0.7,0.3 (default: 1).")
    ] = None,
    combination: Annotated[
        Literal["cat", "linear"], typer.Option(help="How several adapters become one, as in PEFT.")
    ] = "cat",
    keep_16_bits: Annotated[
        bool, typer.Option("--keep-16-bits", help="Leave merged layers of a 4-bit base in 16 bits.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to measure the divergence from the unmerged model on.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    aliases: AliasesOption = None,
) -> None:
    """Merge adapters into a model, and say what rounding the result cost."""
    with expected_errors(), interruptible():
        from nybble.server.cli.merge_report import merge_and_report

        merge_and_report(
            base,
            adapters,
            target,
            format=out,
            weights=None if weights is None else [float(weight) for weight in weights.split(",")],
            combination=combination,
            keep_16_bits=keep_16_bits,
            text=text,
            aliases=aliases,
        )
