"""From a model's name to a checkpoint that opens in seconds.

A model folder in a 4-bit format is packed once, for the device's layout, into the cache; from then
on the packed form is memory-mapped. The key of the cache is the folder's path, the size and time of
its files, how it was rounded, and the packed form's layout and version. An entry replaces the one
that the same model had before it was changed, and a damaged one is packed again. A 16-bit model
that is not to be rounded is memory-mapped as it is. The demo is rounded to 4 bits (GPTQ layout,
groups of 64, with zeros) and its output layer to 8.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

from nybble.kernels.layout import Layout
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
from nybble.loaders.cache import cache_folder
from nybble.loaders.errors import CheckpointError
from nybble.loaders.model_files import side_files
from nybble.loaders.packed_file import VERSION, PackedCheckpoint
from nybble.models import architecture_of
from nybble.quantizers import InFlight, merge_adapter, quantize_checkpoint
from nybble.quantizers.corpus import MERGE_CALIBRATION, text_tokens
from nybble.quantizers.in_flight import InFlightFormat

logger = logging.getLogger(__name__)

DEMO = "demo"
_ORIGIN = "origin.json"
_SCRATCH = (".partial", ".gptq", ".merged")


def prepare_checkpoint(
    name: str,
    *,
    device: torch.device,
    aliases: Path | None = None,
    quantize: InFlightFormat | None = None,
    head: Literal["int8"] | None = None,
    adapter: str | None = None,
    progress: Progress = True,
) -> Checkpoint:
    """Resolve ``name``, pack it into the cache unless it is there, and open it.

    quantize and head: what to round while reading, see :class:`nybble.quantizers.InFlight`.
    adapter: a folder or hub name of what to merge first, in the model's own format, a 4-bit one
        calibrated on Python's sources. Raises what
    resolve_model, open_checkpoint, load_adapter, merge_adapter and save_packed do, and ValueError
    where a packed model is to be changed.
    """
    folder = resolve_model(name, aliases=aliases)
    source = open_checkpoint(folder)
    if source.format == "packed":
        if quantize or head or adapter:
            raise ValueError(f"{folder} is packed already: give the model it was packed from")
        return source
    lora = None
    if adapter is not None:
        lora = load_adapter(resolve_adapter(adapter), architecture_of(source.config))
    demo = name == DEMO and source.format == "none" and quantize is None
    if demo:
        head = "int8"
    if source.format == "none" and not (quantize or head or lora):
        return source
    layout, origin = preferred_layout(device), folder.resolve()
    recipe = f"layers={'demo' if demo else quantize}, head={head}"
    if lora is not None:
        rounding = "" if source.format == "none" else ", calibrated"
        recipe += f", adapter={lora.digest.hex()}{rounding}"
    with _packed(folder, layout, recipe) as (packed, missing), ExitStack() as stack:
        if missing:
            if lora is not None:
                merged = _merged(folder, lora, packed, device, progress, source.format != "none")
                folder = stack.enter_context(merged)
                source = open_checkpoint(folder)
            if demo:
                source = stack.enter_context(_demo_in_gptq(folder, packed, progress))
            if quantize or head:
                source = InFlight(source, layers=quantize, head=head)
            try:
                save_packed(source, packed, layout=layout, progress=progress)
            except OSError as error:
                raise OSError(
                    f"{error}; the cache needs room: free some, or set XDG_CACHE_HOME to a folder "
                    "on another disk"
                ) from error
            _replace_older(packed, {"source": str(origin), "layout": layout, "recipe": recipe})
    return open_checkpoint(packed)


@contextmanager
def _merged(
    folder: Path,
    lora: LoRAAdapter,
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
        )
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


@contextmanager
def _packed(folder: Path, layout: Layout, recipe: str) -> Iterator[tuple[Path, bool]]:
    """Where the packed form belongs, and whether it is not there; one process at a time."""
    packed = cache_folder() / "packed" / f"{folder.name}-{_fingerprint(folder, layout, recipe)}"
    packed.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(packed.with_name(packed.name + ".lock")):
        if packed.is_dir():
            try:
                PackedCheckpoint(packed).check()
            except (CheckpointError, OSError, ValueError) as error:
                logger.warning("%s is damaged and is packed again: %s", packed, error)
                shutil.rmtree(packed)
        yield packed, not packed.is_dir()


def _replace_older(packed: Path, origin: dict[str, str]) -> None:
    """Note what was packed, and remove what the same source gave before it was changed.

    Also what processes that were killed have left half done. A server that still has an old one
    mapped keeps it until it ends.
    """
    (packed / _ORIGIN).write_text(json.dumps(origin))
    for path in packed.parent.iterdir():
        if not path.is_dir() or path == packed:
            continue
        try:
            known = json.loads((path / _ORIGIN).read_text())
        except (OSError, ValueError):
            known = None
        if known == origin or (path.suffix in _SCRATCH and _unlocked(path.with_suffix(".lock"))):
            logger.info("removing %s from the cache: nothing uses it any more", path.name)
            shutil.rmtree(path, ignore_errors=True)
            path.with_name(path.name + ".lock").unlink(missing_ok=True)


def _unlocked(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return True
    except (Timeout, OSError):
        return False


def _fingerprint(folder: Path, layout: Layout, recipe: str) -> str:
    files = [
        *side_files(folder),
        *sorted(p.relative_to(folder) for p in folder.glob("*.safetensors")),
    ]
    status = [(folder / file).stat() for file in files]
    stats = [
        (str(file), of_file.st_size, of_file.st_mtime_ns)
        for file, of_file in zip(files, status, strict=True)
    ]
    parts = (str(folder.resolve()), stats, layout, recipe, VERSION)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
