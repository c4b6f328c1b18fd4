"""From a model's name to a checkpoint that opens in seconds.

A model folder in a 4-bit format is packed once, for the device's layout, into the cache; from then
on the packed form is memory-mapped. The key of the cache is the folder's path, the size and time of
its files, how it was quantized, and the packed form's layout and version. A 16-bit model is
memory-mapped as it is, except for the demo, which is first rounded to 4 bits (GPTQ layout, groups
of 64, with zeros).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from nybble.kernels.layout import Layout
from nybble.kernels.matmul import preferred_layout
from nybble.loaders import Checkpoint, open_checkpoint, resolve_model, save_packed
from nybble.loaders.cache import cache_folder
from nybble.loaders.packed_file import VERSION

DEMO = "demo"
_DEMO_RECIPE = "gptq-64-asym"
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")


def prepare_checkpoint(
    name: str,
    *,
    device: torch.device,
    aliases: Path | None = None,
    quantize: Literal["nf4"] | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Resolve ``name``, pack it into the cache unless it is there, and open it.

    quantize: round a 16-bit checkpoint to this format while it is read. Raises what
    resolve_model, open_checkpoint and save_packed do.
    """
    folder = resolve_model(name, aliases=aliases)
    layout = preferred_layout(device)
    if quantize is not None:
        with _packed(folder, layout, quantize) as (packed, missing):
            if missing:
                source = open_checkpoint(folder, quantize=quantize)  # type: ignore[call-arg, unused-ignore]
                save_packed(source, packed, layout=layout, progress=progress)
        return open_checkpoint(packed)
    source = open_checkpoint(folder)
    if source.format == "packed":
        return source
    if source.format == "none" and name != DEMO:
        return source
    recipe = _DEMO_RECIPE if source.format == "none" else ""
    with _packed(folder, layout, recipe) as (packed, missing):
        if missing and recipe:
            _pack_demo(folder, packed, layout, progress)
        elif missing:
            save_packed(source, packed, layout=layout, progress=progress)
    return open_checkpoint(packed)


def _pack_demo(folder: Path, packed: Path, layout: Layout, progress: bool) -> None:
    # Imported here: only this model is quantized on the way to being served.
    from nybble.quantizers import quantize_checkpoint

    scratch = packed.with_name(packed.name + ".gptq")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        quantize_checkpoint(
            folder, scratch, format="gptq", group_size=64, sym=False, progress=progress
        )
        save_packed(open_checkpoint(scratch), packed, layout=layout, progress=progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _packed(folder: Path, layout: Layout, recipe: str) -> Iterator[tuple[Path, bool]]:
    """Where the packed form belongs, and whether it is not there; one process at a time."""
    packed = cache_folder() / "packed" / f"{folder.name}-{_fingerprint(folder, layout, recipe)}"
    packed.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(packed.with_name(packed.name + ".lock")):
        yield packed, not packed.is_dir()


def _fingerprint(folder: Path, layout: Layout, recipe: str) -> str:
    files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = (str(folder.resolve()), stats, layout, recipe, VERSION)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
