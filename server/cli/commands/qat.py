"""``nybble qat``: trains a model on the grid its weights will have."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.model_path import require_model
from nybble.server.cli.options import DataArgument, ModelArgument, OutArgument
from nybble.server.lifecycle.options import AliasesOption, DeviceOption


def qat(
    base: ModelArgument,
    data: DataArgument,
    out: OutArgument,
    group_size: Annotated[int, typer.Option(min=-1)] = 128,
    sym: Annotated[
        bool, typer.Option("--sym", help="A fixed zero, in the middle of the codes.")
    ] = False,
    bits: Annotated[int, typer.Option(help="Of a weight: 2, 3, 4 or 8.")] = 4,
    distil: Annotated[
        bool,
        typer.Option(
            "--distil", help="Learn the 16-bit model's predictions on DATA, not DATA itself."
        ),
    ] = False,
    learning_rate: Annotated[float, typer.Option()] = 1e-5,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_length: Annotated[int, typer.Option(min=2)] = 512,
    device: DeviceOption = "auto",
    aliases: AliasesOption = None,
) -> None:
    """Train a 16-bit model on the grid its weights will have; write GPTQ's layout."""
    with expected_errors(), interruptible():
        require_model(base, aliases)
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
                bits=bits,
                distil=distil,
                learning_rate=learning_rate,
                steps=steps,
                batch_size=batch_size,
                max_length=max_length,
            ),
            device=resolve_device(device),
        )
        print(f"Wrote {out}: loss {losses[0]:.3f} → {losses[-1]:.3f}", file=sys.stderr)
