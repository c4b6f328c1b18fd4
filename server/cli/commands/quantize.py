"""``nybble quantize``: a 16-bit model becomes a quantized checkpoint."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.model_path import require_model
from nybble.server.cli.options import TargetArgument, TextOption, WrittenFormat, require_empty
from nybble.server.lifecycle.options import AliasesOption, DeviceOption

# Options by the panel that `--help` shows them in.
_method = partial(typer.Option, rich_help_panel="Method")


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="16-bit model.")],
    target: TargetArgument,
    format: Annotated[WrittenFormat, typer.Option(help="Public layout to write.")],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale [default: 128, or 64]; -1 for all (gptq, awq).", min=-1
        ),
    ] = None,
    sym: Annotated[
        bool, typer.Option("--sym", help="A fixed zero, in the middle of the codes (gptq).")
    ] = False,
    bits: Annotated[
        int | None, typer.Option(help="Of a weight: 4, or 2, 3 or 8 (gptq) [default: 4].")
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="absmax in 8 bits (nf4, fp4).")
    ] = False,
    rounding: Annotated[
        bool, _method("--round", help="To the nearest, without calibration.")
    ] = False,
    desc_act: Annotated[bool, _method("--desc-act", help="Strongest inputs first (gptq).")] = False,
    static_groups: Annotated[
        bool, _method("--static-groups", help="Scales of the original weights (gptq).")
    ] = False,
    damp: Annotated[float, _method(help="Of the Hessian's mean diagonal.")] = 0.01,
    clip: Annotated[bool, _method("--clip", help="Search for clipped weights (awq).")] = False,
    text: TextOption = None,
    samples: Annotated[int, _method(help="Calibration texts.", min=1)] = 128,
    length: Annotated[int, _method(help="Tokens in each of them.", min=2)] = 512,
    device: DeviceOption = "auto",
    aliases: AliasesOption = None,
) -> None:
    """Quantize a 16-bit model into a public checkpoint layout, of 4 bits if not told otherwise.

    GPTQ and AWQ are calibrated on text, unless --round is given; NF4 and FP4 need none.
    """
    with expected_errors(), interruptible():
        require_model(source, aliases)
        if group_size == 0:
            raise ValueError("--group-size is 0, expected a positive number or -1")
        require_empty(target)
        from nybble.engine import resolve_device
        from nybble.loaders import resolve_model
        from nybble.loaders.formats import OptionError, WriteOptions, writing_format
        from nybble.quantizers import GptqSettings, quantize_checkpoint
        from nybble.quantizers.corpus import text_tokens

        options = WriteOptions(
            group_size, bits, sym or None, desc_act or None, double_quant or None
        )
        try:
            written = writing_format(format, options)
        except OptionError as error:
            raise ValueError(f"--{error.option.replace('_', '-')} {error.reason}") from error
        method = None if rounding else written.method
        if (desc_act or static_groups) and method != "gptq":
            raise ValueError("--desc-act and --static-groups go with --format gptq and calibration")
        if clip and method != "awq":
            raise ValueError("--clip goes with --format awq and calibration")
        if text is not None and method is None:
            raise ValueError("--text goes with the calibrated formats, gptq and awq")
        folder = resolve_model(source, aliases=aliases)
        quantize_checkpoint(
            folder,
            target,
            format=format,
            group_size=options.group_size,
            sym=options.sym,
            bits=options.bits,
            double_quant=options.double_quant,
            calibration=(
                None
                if method is None
                else text_tokens(folder, text, "calibration", samples, length)
            ),
            settings=(
                GptqSettings(desc_act=desc_act, static_groups=static_groups, damp=damp)
                if method == "gptq"
                else None
            ),
            clip=clip,
            device=resolve_device(device),
        )
        print(f"Wrote {target}", file=sys.stderr)
