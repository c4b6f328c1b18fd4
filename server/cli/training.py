"""The commands that make and measure models: ``nybble quantize|eval|finetune|qat``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from nybble.server.cli.errors import expected_errors, interruptible

if TYPE_CHECKING:
    from nybble.quantizers.corpus import Part
    from torch import Tensor

commands = typer.Typer()

Format = Literal["gptq", "awq", "nf4", "fp4"]
Device = Literal["auto", "cpu", "cuda"]
EvaluationPart = Literal["validation", "held-out"]

_AliasesOption = Annotated[
    Path | None,
    typer.Option(help="TOML file of alias = 'folder or hub name'.", dir_okay=False, exists=True),
]
_TextOption = Annotated[
    Path | None,
    typer.Option(help="Plain text (default: Python's own sources).", dir_okay=False, exists=True),
]
_DataArgument = Annotated[
    Path,
    typer.Argument(help="JSON lines: messages, prompt and completion, or text.", dir_okay=False),
]
_OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
_BaseArgument = Annotated[str, typer.Argument(help="Model folder, hub name or alias.")]
_METHOD, _TRAINING, _LORA = "Method", "Training", "Adapter"


def _tokens(
    model: Path, text: Path | None, part: Part, samples: int, length: int, *, running: bool = False
) -> Tensor:
    """int64 ``(samples, length)`` of the file, or of a part of the standard library.

    running: from the text's beginning on; otherwise from places all over it.
    """
    from nybble.quantizers.corpus import standard_library_text, token_ids, token_windows
    from transformers import AutoTokenizer

    content = standard_library_text(part) if text is None else text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not running:
        return token_windows(tokenizer, content, samples=samples, length=length)
    ids = token_ids(tokenizer, content)[: samples * length]
    if len(ids) < samples * length:
        raise ValueError(f"the text has {len(ids)} tokens, {samples * length} were asked for")
    return ids.view(samples, length)


@commands.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="16-bit model.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    format: Annotated[Format, typer.Option(help="Public layout to write.")],
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale; -1 for all (gptq, awq).", min=-1)
    ] = 128,
    sym: Annotated[bool, typer.Option("--sym", help="A fixed zero of 8 (gptq).")] = False,
    levels: Annotated[
        int, typer.Option(help="Of the 16 codes to use; 8: a 3-bit grid (gptq).", min=2, max=16)
    ] = 16,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="absmax in 8 bits (nf4, fp4).")
    ] = False,
    rounding: Annotated[
        bool,
        typer.Option(
            "--round", help="To the nearest, without calibration.", rich_help_panel=_METHOD
        ),
    ] = False,
    desc_act: Annotated[
        bool,
        typer.Option("--desc-act", help="Strongest inputs first (gptq).", rich_help_panel=_METHOD),
    ] = False,
    static_groups: Annotated[
        bool,
        typer.Option(
            "--static-groups",
            help="Scales of the original weights (gptq).",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    damp: Annotated[
        float, typer.Option(help="Of the Hessian's mean diagonal.", rich_help_panel=_METHOD)
    ] = 0.01,
    clip: Annotated[
        bool,
        typer.Option("--clip", help="Search for clipped weights (awq).", rich_help_panel=_METHOD),
    ] = False,
    text: _TextOption = None,
    samples: Annotated[
        int, typer.Option(help="Calibration texts.", min=1, rich_help_panel=_METHOD)
    ] = 128,
    length: Annotated[
        int, typer.Option(help="Tokens in each of them.", min=2, rich_help_panel=_METHOD)
    ] = 512,
    device: Annotated[Device, typer.Option()] = "auto",
    aliases: _AliasesOption = None,
) -> None:
    """Quantize a 16-bit model to 4 bits in a public checkpoint layout.

    GPTQ and AWQ are calibrated on text, unless --round is given; NF4 and FP4 need none.
    """
    with expected_errors(), interruptible():
        if group_size == 0:
            raise ValueError("--group-size is 0, expected a positive number or -1")
        if sym and format != "gptq":
            raise ValueError(f"--sym goes with --format gptq, not with {format}")
        calibrated = format in ("gptq", "awq") and not rounding
        if (desc_act or static_groups) and not (calibrated and format == "gptq"):
            raise ValueError("--desc-act and --static-groups go with --format gptq and calibration")
        if clip and not (calibrated and format == "awq"):
            raise ValueError("--clip goes with --format awq and calibration")
        if text is not None and not calibrated:
            raise ValueError("--text goes with the calibrated formats, gptq and awq")
        from nybble.engine import resolve_device
        from nybble.loaders import resolve_model
        from nybble.quantizers import GptqSettings, quantize_checkpoint

        folder = resolve_model(source, aliases=aliases)
        quantize_checkpoint(
            folder,
            target,
            format=format,
            group_size=group_size,
            sym=sym,
            levels=levels,
            double_quant=double_quant,
            calibration=(
                _tokens(folder, text, "calibration", samples, length) if calibrated else None
            ),
            settings=(
                GptqSettings(desc_act=desc_act, static_groups=static_groups, damp=damp)
                if calibrated and format == "gptq"
                else None
            ),
            clip=clip,
            device=resolve_device(device),
        )
        print(f"Wrote {target}", file=sys.stderr)


@commands.command("eval")
def evaluate(
    reference: Annotated[str, typer.Argument(help="The full-precision model.")],
    models: Annotated[list[str], typer.Argument(help="Models to compare with it.")],
    text: _TextOption = None,
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
    plot: Annotated[Path | None, typer.Option(help="Image to write.", dir_okay=False)] = None,
    device: Annotated[Device, typer.Option()] = "auto",
    aliases: _AliasesOption = None,
) -> None:
    """Perplexity, KL divergence from the full-precision model, and size.

    Standard errors are of the differences between models on the same windows of text.
    """
    with expected_errors(), interruptible():
        from nybble.engine import resolve_device
        from nybble.loaders import resolve_model
        from nybble.quantizers import evaluate as measure

        if baseline is not None and baseline not in models:
            raise ValueError(f"--baseline {baseline} is not one of the models to compare")
        names = dict(zip(models, _short_names(models), strict=True))
        folder = resolve_model(reference, aliases=aliases)
        others = {short: resolve_model(name, aliases=aliases) for name, short in names.items()}
        samples, length = max(1, tokens // length), min(length, tokens)
        ids = _tokens(folder, text, part, samples, length, running=stride is not None)
        found = measure.evaluate(
            folder,
            others,
            ids.flatten(),
            length=length,
            stride=stride,
            device=resolve_device(device),
        )
        against = None
        if baseline is not None:
            against = next(one for one in found[1:] if one.name == names[baseline])
        print(measure.table(found, against))
        if plot is not None:
            measure.plot(found, plot)


def _short_names(models: list[str]) -> list[str]:
    """The last parts of paths and hub names where these tell the models apart."""
    short = [Path(name).name for name in models]
    return short if len(set(short)) == len(short) else models


@commands.command()
def finetune(
    base: _BaseArgument,
    data: _DataArgument,
    out: _OutArgument,
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out lines (default: some of DATA).", dir_okay=False)
    ] = None,
    rank: Annotated[int, typer.Option(min=1, rich_help_panel=_LORA)] = 16,
    alpha: Annotated[float, typer.Option(rich_help_panel=_LORA)] = 32.0,
    dropout: Annotated[float, typer.Option(rich_help_panel=_LORA)] = 0.0,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by alpha/√rank.", rich_help_panel=_LORA)
    ] = False,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Such as q_proj,v_proj (default: all).", rich_help_panel=_LORA),
    ] = None,
    learning_rate: Annotated[float, typer.Option(rich_help_panel=_TRAINING)] = 5e-5,
    lora_plus: Annotated[
        float, typer.Option(help="B's rate over A's; 1: plain LoRA.", rich_help_panel=_TRAINING)
    ] = 16.0,
    epochs: Annotated[int, typer.Option(min=1, rich_help_panel=_TRAINING)] = 3,
    max_steps: Annotated[
        int, typer.Option(help="0: by epochs.", min=0, rich_help_panel=_TRAINING)
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel=_TRAINING)] = 1,
    accumulation: Annotated[int, typer.Option(min=1, rich_help_panel=_TRAINING)] = 8,
    max_length: Annotated[int, typer.Option(min=2, rich_help_panel=_TRAINING)] = 1024,
    packing: Annotated[
        bool, typer.Option(help="Several examples to a row.", rich_help_panel=_TRAINING)
    ] = True,
    eval_every: Annotated[int, typer.Option(min=1, rich_help_panel=_TRAINING)] = 25,
    patience: Annotated[
        int,
        typer.Option(
            help="Evaluations without gain before stopping; 0: never.",
            min=0,
            rich_help_panel=_TRAINING,
        ),
    ] = 3,
    seed: Annotated[int, typer.Option(rich_help_panel=_TRAINING)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT's checkpoint.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Image of losses.", dir_okay=False)] = None,
    device: Annotated[Device, typer.Option()] = "auto",
    aliases: _AliasesOption = None,
) -> None:
    """Train a LoRA adapter on a frozen base, 4-bit or 16-bit, and save it in PEFT's format."""
    with expected_errors(), interruptible():
        from nybble.engine import resolve_device
        from nybble.finetune import FinetuneSettings, LoraSettings, plot_losses
        from nybble.finetune import finetune as train
        from nybble.finetune.lora import ALL_LINEAR
        from nybble.loaders import resolve_model

        lora = LoraSettings(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            use_rslora=rslora,
            target_modules=ALL_LINEAR if target_modules is None else _names(target_modules),
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
            f"{result.best_eval_loss:.3f} at step {result.best_step}, "
            f"{result.trained_parameters:,} parameters",
            file=sys.stderr,
        )
        if plot is not None:
            plot_losses({out.name: result.history}, plot)


@commands.command()
def qat(
    base: _BaseArgument,
    data: _DataArgument,
    out: _OutArgument,
    group_size: Annotated[int, typer.Option(min=-1)] = 128,
    sym: Annotated[bool, typer.Option("--sym", help="A fixed zero of 8.")] = False,
    levels: Annotated[
        int, typer.Option(help="Of the 16 codes to use; 8: a 3-bit grid.", min=2, max=16)
    ] = 16,
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
    device: Annotated[Device, typer.Option()] = "auto",
    aliases: _AliasesOption = None,
) -> None:
    """Train a 16-bit model on the grid of 4 bits or less it will have, and write GPTQ's layout."""
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
                levels=levels,
                distil=distil,
                learning_rate=learning_rate,
                steps=steps,
                batch_size=batch_size,
                max_length=max_length,
            ),
            device=resolve_device(device),
        )
        print(f"Wrote {out}: loss {losses[0]:.3f} → {losses[-1]:.3f}", file=sys.stderr)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
