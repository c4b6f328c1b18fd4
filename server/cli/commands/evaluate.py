"""``nybble eval``: what quantizing cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.options import AliasesOption, DeviceOption, TextOption
from nybble.server.cli.text_tokens import text_tokens


def evaluate(
    reference: Annotated[str, typer.Argument(help="The full-precision model.")],
    models: Annotated[list[str], typer.Argument(help="Models to compare with it.")],
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(help="Of the text, to measure on.", min=2)] = 16384,
    length: Annotated[int, typer.Option(help="Tokens in a window.", min=2)] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="Between windows (default: no overlap).", min=1)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Image to write.", dir_okay=False)] = None,
    device: DeviceOption = "auto",
    aliases: AliasesOption = None,
) -> None:
    """Perplexity, KL divergence from the full-precision model, and size."""
    with expected_errors(), interruptible():
        from nybble.engine import resolve_device
        from nybble.loaders import resolve_model
        from nybble.quantizers import evaluate as measure

        folder = resolve_model(reference, aliases=aliases)
        others = {name: resolve_model(name, aliases=aliases) for name in models}
        samples = max(1, tokens // length)
        ids = text_tokens(folder, text, "held-out", samples, min(length, tokens)).flatten()
        found = measure.evaluate(
            folder, others, ids, length=length, stride=stride, device=resolve_device(device)
        )
        print(measure.table(found))
        if plot is not None:
            measure.plot(found, plot)
