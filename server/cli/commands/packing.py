"""``nybble pack`` and ``nybble inspect``: a model's packed form."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.model_path import require_model
from nybble.server.cli.options import ModelArgument, TargetArgument, require_empty
from nybble.server.lifecycle.options import AliasesOption


def pack(
    source: ModelArgument,
    target: TargetArgument,
    layout: Annotated[
        Literal["auto", "rows", "cpu_tiles"],
        typer.Option(help="Layout of the codes (auto: for this machine)."),
    ] = "auto",
    aliases: AliasesOption = None,
) -> None:
    """Write a model's packed form, which loads by memory-mapping."""
    with expected_errors(), interruptible():
        require_model(source, aliases)
        require_empty(target)
        from nybble.engine import resolve_device
        from nybble.kernels.matmul import preferred_layout
        from nybble.loaders import open_checkpoint, resolve_model, save_packed

        save_packed(
            open_checkpoint(resolve_model(source, aliases=aliases)),
            target,
            layout=preferred_layout(resolve_device("auto")) if layout == "auto" else layout,
        )
        print(f"Wrote {target}", file=sys.stderr)


def inspect(
    model: ModelArgument,
    every: Annotated[
        bool, typer.Option("--all", help="Every layer, not one line for alike layers.")
    ] = False,
    aliases: AliasesOption = None,
) -> None:
    """Show what a model's weights are made of."""
    with expected_errors(), interruptible():
        require_model(model, aliases)
        from nybble.engine import resolve_device
        from nybble.loaders import open_checkpoint, resolve_model
        from nybble.loaders.inspect import inspect_checkpoint
        from nybble.model_name import DEMO
        from nybble.quantizers.prepare import demo_form
        from nybble.server.cli.inspect_table import print_table

        checkpoint = open_checkpoint(resolve_model(model, aliases=aliases))
        if model == DEMO and checkpoint.format == "none":
            packed = demo_form(checkpoint.folder, resolve_device("auto"))
            if packed is not None:
                checkpoint = open_checkpoint(packed)
                print("as `nybble serve demo` runs it:", file=sys.stderr)
            else:
                print(
                    "as it was downloaded: `nybble serve demo` rounds it to 4 bits (GPTQ, groups "
                    "of 64) and its output layer to 8 at its first start",
                    file=sys.stderr,
                )
        print_table(inspect_checkpoint(checkpoint), every=every)
