"""``nybble qat``: trains a model on its 4-bit grid."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.options import (
    AliasesOption,
    DataArgument,
    DeviceOption,
    ModelArgument,
    OutArgument,
)


def qat(
    base: ModelArgument,
    data: DataArgument,
    out: OutArgument,
    group_size: Annotated[int, typer.Option(min=-1)] = 128,
    sym: Annotated[bool, typer.Option("--sym", help="A fixed zero of 8.")] = False,
    learning_rate: Annotated[float, typer.Option()] = 1e-5,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_length: Annotated[int, typer.Option(min=2)] = 512,
    device: DeviceOption = "auto",
    aliases: AliasesOption = None,
) -> None:
    """Train a 16-bit model on its 4-bit grid and write it in GPTQ's layout."""
    with expected_errors(), interruptible():
        from nybble.engine import resolve_device
        from nybble.finetune.qat import QatSettings, quantization_aware_train
        from nybble.loaders import resolve_model

        losses = quantization_aware_train(
            resolve_model(base, aliases=aliases),
            data,
            out,
            settings=QatSettings(
                group_size=group_size,
                sym=sym,
                learning_rate=learning_rate,
                steps=steps,
                batch_size=batch_size,
                max_length=max_length,
            ),
            device=resolve_device(device),
        )
        print(f"Wrote {out}: loss {losses[0]:.3f} → {losses[-1]:.3f}", file=sys.stderr)
