"""``nybble eval-adapter``: what holding an adapter in 8 bits costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.model_path import require_model
from nybble.server.cli.options import ModelArgument
from nybble.server.lifecycle.options import AliasesOption


def evaluate_adapter(
    base: ModelArgument,
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub name.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to measure on (default: Python's own sources).", exists=True, dir_okay=False
        ),
    ] = None,
    aliases: AliasesOption = None,
) -> None:
    """What --lora-dtype int8 costs: the KL divergence of an adapter in 8 bits from itself.

    Whole matrices of the embedding and the output layer (modules_to_save) are among what is
    rounded. For comparison, the divergence of the base without the adapter. On the CPU, as 8 bits
    are.
    """
    with expected_errors(), interruptible():
        require_model(base, aliases)
        from nybble.loaders import load_adapter, open_checkpoint, resolve_adapter, resolve_model
        from nybble.models import architecture_of
        from nybble.quantizers import merge_divergence, rounding_divergence
        from nybble.server.cli.merge_report import measured_text

        source = resolve_model(base, aliases=aliases)
        loaded = load_adapter(
            resolve_adapter(adapter), architecture_of(open_checkpoint(source).config)
        )
        ids = measured_text(source, text)
        cost = rounding_divergence(source, loaded, ids, progress=True)
        effect = merge_divergence(source, loaded, source, ids, progress=True)
        where = text or "Python's own sources"
        print(
            f"KL(adapter in 16 bits ‖ in 8 bits) on {len(ids)} tokens of {where}: {cost:.6f} nats "
            f"a token; without the adapter it is {effect:.6f}"
        )
