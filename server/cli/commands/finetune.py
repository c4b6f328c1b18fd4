"""``nybble finetune``: trains an adapter on a frozen base."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.model_path import require_model
from nybble.server.cli.options import DataArgument, ModelArgument, OutArgument
from nybble.server.cli.plotting import require_plot
from nybble.server.lifecycle.options import AliasesOption, DeviceOption

if TYPE_CHECKING:
    from nybble.finetune.train import FinetuneResult

# Options by the panel that `--help` shows them in.
_training = partial(typer.Option, rich_help_panel="Training")
_adapter = partial(typer.Option, rich_help_panel="Adapter")


def finetune(
    base: ModelArgument,
    data: DataArgument,
    out: OutArgument,
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out lines (default: some of DATA).", dir_okay=False)
    ] = None,
    rank: Annotated[int, _adapter(min=1)] = 16,
    alpha: Annotated[float, _adapter()] = 32.0,
    dropout: Annotated[float, _adapter()] = 0.0,
    rslora: Annotated[bool, _adapter("--rslora", help="Scale by alpha/√rank.")] = False,
    target_modules: Annotated[
        str | None, _adapter(help="Such as q_proj,v_proj (default: all).")
    ] = None,
    learning_rate: Annotated[float, _training()] = 5e-5,
    lora_plus: Annotated[float, _training(help="B's rate over A's; 1: plain LoRA.")] = 16.0,
    epochs: Annotated[int, _training(min=1)] = 3,
    max_steps: Annotated[int, _training(help="0: by epochs.", min=0)] = 0,
    batch_size: Annotated[int, _training(min=1)] = 1,
    accumulation: Annotated[int, _training(min=1)] = 8,
    max_length: Annotated[int, _training(min=2)] = 1024,
    packing: Annotated[
        bool | None,
        _training(
            "--packing/--no-packing",
            help="Several examples to a row (default: if the model keeps them apart).",
        ),
    ] = None,
    warmup: Annotated[
        float, _training(help="Part of the steps in which the rate rises.", min=0, max=1)
    ] = 0.05,
    gradient_checkpointing: Annotated[
        bool, _training(help="Compute activations twice, keep few.")
    ] = True,
    eval_every: Annotated[
        int,
        _training(help="Steps between evaluations; 0: ten in a run, in long ones every 25.", min=0),
    ] = 0,
    patience: Annotated[
        int, _training(help="Evaluations without gain before stopping; 0: never.", min=0)
    ] = 3,
    seed: Annotated[int, _training()] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT's checkpoint.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Image of losses.", dir_okay=False)] = None,
    device: DeviceOption = "auto",
    aliases: AliasesOption = None,
) -> None:
    """Train a LoRA adapter on a frozen base, 4-bit or 16-bit, and save it in PEFT's format."""
    with expected_errors(), interruptible():
        require_plot(plot)
        require_model(base, aliases)
        from nybble.engine import resolve_device
        from nybble.finetune import FinetuneSettings, LoRASettings, plot_losses
        from nybble.finetune import finetune as train
        from nybble.finetune.train import NOTHING_LEARNED
        from nybble.loaders import resolve_model

        lora = LoRASettings(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            use_rslora=rslora,
            target_modules=None if target_modules is None else _names(target_modules),
        )
        settings = FinetuneSettings(
            lora=lora,
            learning_rate=learning_rate,
            lora_plus=lora_plus,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            accumulation=accumulation,
            max_length=max_length,
            packing=packing,
            warmup=warmup,
            gradient_checkpointing=gradient_checkpointing,
            eval_every=eval_every,
            patience=patience,
            seed=seed,
        )
        result = train(
            resolve_model(base, aliases=aliases),
            data,
            out,
            settings=settings,
            eval_data=eval_data,
            resume=resume,
            device=resolve_device(device),
        )
        print(
            f"Wrote {out}: held-out loss {result.history[0].eval_loss:.3f} → "
            f"{result.best_eval_loss:.3f} at step {result.best_step} of {_made(result)}, "
            f"{result.trained_parameters:,} parameters; peak memory "
            f"{result.peak_bytes / 2**20:,.0f} MiB, of which the base's weights "
            f"{result.base_bytes / 2**20:,.0f}",
            file=sys.stderr,
        )
        if not result.best_step:
            print(f"warning: {NOTHING_LEARNED}", file=sys.stderr)
        if plot is not None:
            plot_losses({out.name: result.history}, plot)


def _made(result: FinetuneResult) -> str:
    made = result.history[-1].step
    return str(made) if made == result.steps else f"{made} ({result.steps} but for --patience)"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
