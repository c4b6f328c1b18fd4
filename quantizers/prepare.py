"""From a model's name to a checkpoint that opens in seconds.

A model folder in a 4-bit format is packed once into the cache, in the device's layout. Later starts
memory-map the packed form. The key of the cache is the folder's path, the size and time of
its files, how it was rounded, and the packed form's layout and version. A new
entry replaces older ones of the same model, and a damaged entry is packed again. A 16-bit model
that is not to be rounded is memory-mapped as it is. The demo is rounded to 4 bits (GPTQ layout,
groups of 64, with zeros) and its output layer to 8.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from nybble.kernels.matmul import preferred_layout
from nybble.kernels.progress import Progress
from nybble.loaders import (
    Checkpoint,
    LoRAAdapter,
    load_adapter,
    open_checkpoint,
    resolve_adapter,
    resolve_model,
    save_packed,
)
from nybble.loaders.adapter import content_digest
from nybble.loaders.footprint import RoundedParts
from nybble.model_name import DEMO
from nybble.models import architecture_of
from nybble.quantizers import InFlight, merge_adapter, quantize_checkpoint
from nybble.quantizers.corpus import MERGE_CALIBRATION, text_tokens
from nybble.quantizers.in_flight import HeadFormat, InFlightFormat, head_format
from nybble.quantizers.packed_cache import Origin, keep, reserved

logger = logging.getLogger(__name__)


def opened(name: str, *, aliases: Path | None = None) -> Checkpoint:
    """What ``name`` is, as it is stored. Raises what resolve_model and open_checkpoint do."""
    return open_checkpoint(resolve_model(name, aliases=aliases))


def rounded_parts(
    name: str,
    source: Checkpoint,
    quantize: InFlightFormat | None = None,
    head: HeadFormat = "16bit",
) -> RoundedParts:
    """Which layers of ``source``, called ``name``, and whether its head are rounded on the way."""
    if _is_demo(name, source, quantize):
        return "4bit", "int8"
    return "4bit" if quantize else None, head_format(source, quantize, head)


def _is_demo(name: str, source: Checkpoint, quantize: InFlightFormat | None) -> bool:
    return name == DEMO and source.format == "none" and quantize is None


def prepare_checkpoint(
    name: str,
    *,
    device: torch.device,
    aliases: Path | None = None,
    quantize: InFlightFormat | None = None,
    head: HeadFormat = "16bit",
    adapter: str | None = None,
    check: Callable[[Checkpoint], None] = lambda source: None,
    progress: Progress = True,
) -> Checkpoint:
    """Resolve ``name``, pack it into the cache unless it is there, and open it.

    quantize and head: what to round while reading, see :class:`nybble.quantizers.InFlight` and
        :func:`nybble.quantizers.in_flight.head_format`.
    adapter: a folder or hub name of what to merge first, in the model's own format, a 4-bit one
        calibrated on Python's sources.
    check: called with the model as it is stored before anything is computed; what it raises ends
        it.

    Raises what resolve_model, open_checkpoint, load_adapter, merge_adapter and save_packed do, and
    ValueError if a packed model is to be changed.
    """
    source = opened(name, aliases=aliases)
    folder = source.folder
    check(source)
    if source.format == "packed":
        if quantize or head == "int8" or adapter:
            raise ValueError(f"{folder} is packed already: give the model it was packed from")
        return source
    lora = own = None
    if adapter is not None:
        own = resolve_adapter(adapter)
        lora = load_adapter(own, architecture_of(source.config))
    demo = _is_demo(name, source, quantize)
    rounded = "int8" if demo else head_format(source, quantize, head)
    if source.format == "none" and not (quantize or rounded or lora):
        return source
    layout = preferred_layout(device)
    recipe = _recipe("demo" if demo else quantize, rounded)
    if own is not None:
        rounding = "" if source.format == "none" else ", calibrated"
        recipe += f", adapter={content_digest(own)}{rounding}"
    origin = Origin(folder.resolve(), layout, recipe)
    with reserved(origin) as (packed, missing), ExitStack() as stack:
        if missing:
            if lora is not None and own is not None:
                calibrated = source.format != "none"
                merged = _merged(folder, lora, own, packed, device, progress, calibrated)
                folder = stack.enter_context(merged)
                source = open_checkpoint(folder)
            if demo:
                source = stack.enter_context(_demo_in_gptq(folder, packed, progress))
            if quantize or rounded:
                source = InFlight(source, layers=quantize, head=rounded)
            try:
                save_packed(source, packed, layout=layout, progress=progress)
            except OSError as error:
                raise OSError(
                    f"{error}; the cache needs room: free some, or set XDG_CACHE_HOME to a folder "
                    "on another disk"
                ) from error
            keep(packed, origin)
    return open_checkpoint(packed)


def demo_form(folder: Path, device: torch.device) -> Path | None:
    """The folder of the demo's packed form; None before its first start."""
    packed = Origin(folder.resolve(), preferred_layout(device), _recipe("demo", "int8")).place()
    return packed if packed.is_dir() else None


def _recipe(layers: str | None, head: str | None) -> str:
    return f"layers={layers}, head={head}"


@contextmanager
def _merged(
    folder: Path,
    lora: LoRAAdapter,
    own: Path,
    packed: Path,
    device: torch.device,
    progress: Progress,
    calibrated: bool,
) -> Iterator[Path]:
    scratch = packed.with_name(packed.name + ".merged")
    shutil.rmtree(scratch, ignore_errors=True)
    calibration = None
    if calibrated:
        calibration = text_tokens(folder, None, "calibration", *MERGE_CALIBRATION)
    try:
        layers = merge_adapter(
            folder,
            lora,
            scratch,
            calibration=calibration,
            device=device,
            progress=progress,
            folder=own,
        )
        if layers:
            logger.info(
                "merged %d layers; rounding them moved them %.2g times as far as the adapter does",
                len(layers),
                sum(layer.relative_to_change for layer in layers) / len(layers),
            )
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _demo_in_gptq(folder: Path, packed: Path, progress: Progress) -> Iterator[Checkpoint]:
    scratch = packed.with_name(packed.name + ".gptq")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        quantize_checkpoint(
            folder, scratch, format="gptq", group_size=64, sym=False, progress=progress
        )
        yield open_checkpoint(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
