"""``nybble merge``: folds adapters into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.model_path import require_model
from nybble.server.cli.options import ModelArgument, TargetArgument, WrittenFormat, require_empty
from nybble.server.lifecycle.options import AliasesOption, DeviceOption


def merge(
    base: ModelArgument,
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders or hub names.")
    ],
    target: TargetArgument,
    out: Annotated[
        Literal[WrittenFormat, "bf16"] | None,
        typer.Option(help="Layout to write (default: the base's)."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale, with --out [default: the base's, 128, or 64]; -1 for "
            "all (gptq, awq).",
            min=-1,
        ),
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
    rounding: Annotated[
        bool, typer.Option("--round", help="To the nearest, without calibration.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text to keep the rounding error small on (default: Python's own sources).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Texts of 512 tokens taken from it.", min=1)] = 16,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to measure the divergence from the unmerged model on (default: Python's).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    aliases: AliasesOption = None,
) -> None:
    """Merge adapters into a model, and say what rounding the result cost.

    In 4 bits the rounding is calibrated on text unless --round is given: that takes minutes for a
    model of 0.5B parameters on two cores, but to the nearest most of a small adapter is lost.
    """
    with expected_errors(), interruptible():
        require_model(base, aliases)
        if rounding and calibration is not None:
            raise ValueError("--round and --calibration exclude each other")
        if group_size == 0:
            raise ValueError("--group-size is 0, expected a positive number or -1")
        require_empty(target)
        from nybble.engine import resolve_device
        from nybble.loaders.formats import OptionError
        from nybble.server.cli.merge_report import Calibration, merge_and_report

        try:
            merge_and_report(
                base,
                adapters,
                target,
                format=out,
                group_size=group_size,
                weights=None if weights is None else [float(each) for each in weights.split(",")],
                combination=combination,
                keep_16_bits=keep_16_bits,
                calibration=None if rounding else Calibration(calibration, samples),
                text=text,
                device=resolve_device(device),
                aliases=aliases,
            )
        except OptionError as error:
            raise ValueError(f"--{error.option.replace('_', '-')} {error.reason}") from error
