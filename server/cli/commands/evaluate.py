"""``nybble eval``: what quantizing cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.model_path import require_model
from nybble.server.cli.options import TextOption
from nybble.server.cli.plotting import require_plot
from nybble.server.lifecycle.options import AliasesOption, DeviceOption

EvaluationPart = Literal["validation", "held-out"]


def evaluate(
    reference: Annotated[str, typer.Argument(help="The full-precision model.")],
    models: Annotated[list[str], typer.Argument(help="Models to compare with it.")],
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(help="Of the text, to measure on.", min=2)] = 16384,
    length: Annotated[int, typer.Option(help="Tokens in a window.", min=2)] = 1024,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Slide the window over running text by so many tokens (default: no overlap, "
            "windows from all over the text).",
            min=1,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Compare with this one of MODELS, not with the full-precision model."),
    ] = None,
    part: Annotated[
        EvaluationPart, typer.Option(help="Of Python's sources: to choose by, or to report.")
    ] = "held-out",
    float32: Annotated[
        bool,
        typer.Option(
            "--float32", help="The full-precision model in float32, and then in bfloat16 too."
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Image to write.", dir_okay=False)] = None,
    device: DeviceOption = "auto",
    aliases: AliasesOption = None,
) -> None:
    """Perplexity, KL divergence from the full-precision model, and size.

    Standard errors are of the differences between models on the same windows of text.
    """
    with expected_errors(), interruptible():
        require_plot(plot)
        require_model(reference, aliases)
        import torch

        from nybble.engine import resolve_device
        from nybble.loaders import open_checkpoint, resolve_model
        from nybble.quantizers import evaluate as measure
        from nybble.quantizers.corpus import text_tokens

        if baseline is not None and baseline not in models:
            raise ValueError(f"--baseline {baseline} is not one of the models to compare")
        names = dict(zip(models, _short_names(models), strict=True))
        folder = resolve_model(reference, aliases=aliases)
        others = {short: resolve_model(name, aliases=aliases) for name, short in names.items()}
        for each in (folder, *others.values()):
            open_checkpoint(each)  # refuses what cannot be measured before any is
        samples, length = max(1, tokens // length), min(length, tokens)
        ids = text_tokens(folder, text, part, samples, length, running=stride is not None)
        found = measure.evaluate(
            folder,
            others,
            ids.flatten(),
            length=length,
            stride=stride,
            device=resolve_device(device),
            reference_dtype=torch.float32 if float32 else None,
        )
        against = None
        if baseline is not None:
            against = next(one for one in found[1:] if one.name == names[baseline])
        print(measure.table(found, against))
        if plot is not None:
            measure.plot(found, plot)


def _short_names(models: list[str]) -> list[str]:
    """The last parts of paths and hub names, if these tell the models apart."""
    short = [Path(name).name for name in models]
    return short if len(set(short)) == len(short) else models
