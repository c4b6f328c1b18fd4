"""The packed form on disk: a folder that loads by memory-mapping.

``nybble.json`` describes every weight; ``packed-NNNNN.safetensors`` hold their tensors, named
``<module>|<field>``, in the layout of the back end they were saved for. config.json and the
tokenizer's files lie beside them, so the folder is a complete model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.layout import Layout
from nybble.kernels.progress import Progress, track
from nybble.loaders.checkpoint import Checkpoint, Weight
from nybble.loaders.errors import CheckpointError
from nybble.loaders.model_config import load_config
from nybble.loaders.model_files import copy_side_files
from nybble.loaders.output_folder import whole_folder
from nybble.loaders.safetensors_file import write_safetensors
from nybble.loaders.shards import Shards

HEADER = "nybble.json"
VERSION = 3  # higher whenever what is stored in a layout changes
# Tensor names of each kind of weight: required, optional.
_TENSORS = {
    "tensor": (("value",), ()),
    "dense": (("weight",), ("bias",)),
    "packed": (("qweight", "scales"), ("zeros", "perm", "bias")),
}
_SHARD_BYTES = 256 << 20  # writing needs about twice this in memory


def save_packed(
    checkpoint: Checkpoint, folder: Path, *, layout: Layout, progress: Progress = True
) -> None:
    """Write a checkpoint's packed form to ``folder``, complete or not at all.

    Raises OSError if it cannot be written.
    """
    with whole_folder(folder) as scratch:
        try:
            _write(checkpoint, scratch, layout, progress)
            # fsync: otherwise a power failure could leave a complete folder with empty files.
            for path in (*scratch.rglob("*"), scratch):
                _to_disk(path)
        except OSError as error:
            raise OSError(f"cannot write the packed model to {folder}: {error}") from error


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(checkpoint: Checkpoint, folder: Path, layout: Layout, progress: Progress) -> None:
    modules: dict[str, Any] = {}
    shard: dict[str, Tensor] = {}
    written = 0

    def flush() -> None:
        nonlocal written, shard
        if not shard:
            return
        write_safetensors(shard, folder / f"packed-{written:05}.safetensors")
        written, shard = written + 1, {}

    for name, weight in track(checkpoint.weights(), "Packing", progress, unit="tensors"):
        if isinstance(weight, PackedWeight):
            weight = weight.to_layout(layout)
        modules[name], tensors = _describe(weight)
        shard |= {f"{name}|{field}": tensor.contiguous() for field, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES:
            flush()
    flush()
    header = {"version": VERSION, "format": checkpoint.format, "modules": modules}
    (folder / HEADER).write_text(json.dumps(header, indent=1))
    copy_side_files(checkpoint.folder, folder)


def _describe(weight: Weight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if isinstance(weight, Tensor):
        return {"kind": "tensor"}, {"value": weight}
    kind = "dense" if isinstance(weight, DenseWeight) else "packed"
    found = {field: getattr(weight, field) for fields in _TENSORS[kind] for field in fields}
    tensors = {field: tensor for field, tensor in found.items() if tensor is not None}
    if isinstance(weight, DenseWeight):
        return {"kind": "dense"}, tensors
    return {
        "kind": "packed",
        "layout": weight.layout,
        "out_features": weight.out_features,
        "in_features": weight.in_features,
        "group_size": weight.group_size,
        "levels": weight.levels.tolist(),
    }, tensors


class PackedCheckpoint:
    """A folder written by :func:`save_packed`; its tensors are views of the mapped files."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for a header this version does not know."""
        path = folder / HEADER
        try:
            header = json.loads(path.read_text())
            version = header["version"]
            self._modules: dict[str, dict[str, Any]] = dict(header["modules"])
            self.source_format: str = header["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a packed model's header: {error!r}") from error
        if version != VERSION:
            raise CheckpointError(
                f"{path} has version {version}, expected {VERSION}: pack it again"
            )
        self.folder = folder
        self.config = load_config(folder)
        self.format = "packed"

    def check(self) -> None:
        """Check every file's header. Raises CheckpointError if a file is truncated or missing."""
        self._checked_shards()

    def _checked_shards(self) -> Shards:
        shards = Shards(self.folder)
        described: set[str] = set()
        for name, module in self._modules.items():
            kind = module.get("kind") if isinstance(module, dict) else None
            if kind not in _TENSORS:
                raise CheckpointError(f"{self.folder / HEADER}: {name} is of no kind known here")
            required, optional = _TENSORS[kind]
            for field in required:
                if f"{name}|{field}" not in shards:
                    raise CheckpointError(f"{self.folder} has no tensor {name}|{field}")
            described.update(f"{name}|{field}" for field in (*required, *optional))
        for tensor in shards.names():
            if tensor not in described:
                raise CheckpointError(f"{self.folder / HEADER} does not describe {tensor}")
        return shards

    def weights(self) -> Iterator[tuple[str, Weight]]:
        shards = self._checked_shards()
        for name, module in self._modules.items():
            about = dict(module)
            kind = about.pop("kind")
            prefix = name + "|"
            if kind == "tensor":
                yield name, shards.read(prefix + "value")
                continue
            for field in (field for fields in _TENSORS[kind] for field in fields):
                stored = prefix + field
                about[field] = shards.read(stored) if stored in shards else None
            try:
                if kind == "packed":
                    about["levels"] = torch.tensor(about["levels"])
                    packed = PackedWeight(**about)
                    _check_perm(packed.perm, packed.in_features)
                    weight: Weight = packed
                else:
                    weight = DenseWeight(**about)
            except (TypeError, ValueError, KeyError) as error:
                raise CheckpointError(f"{self.folder / HEADER}: {name}: {error}") from error
            yield name, weight


def _check_perm(perm: Tensor | None, in_features: int) -> None:
    """Raises ValueError if an index is out of range: kernels use it as an address unchecked."""
    if perm is None:
        return
    lowest, highest = (int(end) for end in perm.aminmax())
    if lowest < 0 or highest >= in_features:
        raise ValueError(f"perm goes from {lowest} to {highest}, expected 0 to {in_features - 1}")
