"""The memory a model's weights take, computed from the headers of its files alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from nybble.loaders.errors import CheckpointError
from nybble.loaders.experts import open_shards
from nybble.loaders.formats import format_of
from nybble.loaders.formats.codebook import BLOCKSIZE
from nybble.loaders.model_config import load_config
from nybble.loaders.shards import Shards
from nybble.loaders.tensor_file import TensorHeader
from nybble.models import Architecture, architecture_of
from nybble.models.eagle3 import is_eagle3

# Of a 16-bit model, what is rounded while it is loaded: its layers, its head.
RoundedParts = tuple[Literal["4bit"] | None, Literal["int8"] | None]

# Bytes of a weight with its share of the scales. In 4 bits: blocks of 64 with a float32 scale, or
# with a scale and a zero of 16 bits. In 8 bits: two 16-bit scales for 128 weights.
_FOUR_BITS = 1 / 2 + 4 / BLOCKSIZE
_EIGHT_BITS = 1 + 4 / 128
_PERM_BYTES = 8  # for a column of an 8-bit weight: two int32
_PACKED_FIELDS = ("scales", "zeros")  # fields of the packed form other than the codes
_HEAD = "lm_head.weight"
_UNREAD = "t2d"  # of an EAGLE-3 head
_EMBEDDING = "embed_tokens.weight"


def weight_bytes(
    folder: Path,
    dtype: torch.dtype,
    *,
    layers: Literal["4bit"] | None = None,
    head: Literal["int8"] | None = None,
    part: Architecture | None = None,
) -> int:
    """Bytes of the weights once they are loaded in ``dtype``, without the padding of tiles.

    layers, head: which parts of a 16-bit model are quantized while loading.
    part: what is loaded of the folder; None for the model that its config describes.
    Raises CheckpointError if files are missing or broken.
    """
    config = load_config(folder)
    if is_eagle3(config):  # in 16 bits whatever is asked
        own = Shards(folder).headers()
        return sum(each.elements * dtype.itemsize for each in own if each.name != _UNREAD)
    architecture = part or architecture_of(config)
    if (folder / "nybble.json").is_file():  # the packed form: nothing is quantized anew
        shards, linears, wide = Shards(folder), frozenset[str](), frozenset[str]()
    else:
        shards, wide = open_shards(folder, architecture), architecture.tensors
        linears = frozenset(name + ".weight" for name in architecture.linears)
    format = format_of(folder)
    headers = {header.name: header for header in shards.headers()}
    total = 0.0
    for linear in architecture.computed_in_16_bits.values():
        total += linear.out * linear.inputs * dtype.itemsize
    for module, names in shards.modules.items():
        if module.partition("|")[0] in architecture.computed_in_16_bits:
            continue
        leaves = {leaf: headers[name] for leaf, name in names.items()}
        if format is not None and format.owns(names):
            for leaf in sorted(format.required.difference(leaves)):
                raise CheckpointError(f"{folder} has no tensor {module}.{leaf}")
            if layers and format.in_16_bits:
                total += leaves["weight"].elements * _FOUR_BITS
            else:
                total += format.loaded_bytes(module, leaves, dtype)
            if "bias" in leaves:
                total += leaves["bias"].elements * leaves["bias"].itemsize
            continue
        for leaf, header in leaves.items():
            if format is not None and leaf in format.ignored:
                continue
            if header.name == _HEAD and head:
                total += _int8_bytes(header.shape)
            elif layers and header.name in linears:
                total += header.elements * _FOUR_BITS
            else:
                total += _loaded(header, torch.float32 if header.name in wide else dtype)
    output = _HEAD.removesuffix("weight")
    if head and not any(name.startswith(output) for name in headers):
        # Was tied to the embedding; a quantized head is separate.
        tied = (h for name, h in headers.items() if name.endswith(_EMBEDDING))
        total += sum(_int8_bytes(h.shape) for h in tied)
    return round(total)


def _int8_bytes(shape: Iterable[int]) -> float:
    out, columns = shape
    return out * columns * _EIGHT_BITS + columns * _PERM_BYTES


def _loaded(header: TensorHeader, dtype: torch.dtype) -> int:
    stored = header.elements * header.itemsize
    if not header.floating or header.name.rpartition("|")[2] in _PACKED_FIELDS:
        return stored
    return header.elements * dtype.itemsize
