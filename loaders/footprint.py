"""What a model's weights take in memory, from the headers of its files alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from nybble.loaders.checkpoint import quantization_settings
from nybble.loaders.shards import Shards, TensorHeader

# Bytes of a weight and its share of the scales: blocks of 64 with a float32, or with a scale and a
# zero in 16 bits, in 4 bits; two scales in 16 bits for 128 in 8.
_FOUR_BITS = 1 / 2 + 4 / 64
_EIGHT_BITS = 1 + 4 / 128
_PERM_BYTES = 8  # of an 8-bit weight's column: two int32
_PACKED_FIELDS = ("scales", "zeros")  # of the packed form, beside its codes
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"


def weight_bytes(
    folder: Path,
    dtype: torch.dtype,
    *,
    layers: Literal["4bit"] | None = None,
    head: Literal["int8"] | None = None,
) -> int:
    """Bytes of the weights once they are loaded in ``dtype``, tiles' padding left out.

    layers, head: what of a 16-bit model is rounded while loading. Raises CheckpointError where
    files are missing or broken.
    """
    headers = list(Shards(folder).headers())
    settings = quantization_settings(folder) or {}
    names = {header.name for header in headers}
    total = 0.0
    for header in headers:
        if header.name == _HEAD and head:
            total += _int8_bytes(header.shape)
        elif layers and _is_linear(header):
            total += header.elements * _FOUR_BITS
        else:
            total += _loaded(header, names, settings, dtype)
    if head and _HEAD not in names:  # tied to the embedding, and now separate from it
        total += sum(_int8_bytes(h.shape) for h in headers if h.name.endswith(_EMBEDDING))
    return round(total)


def _is_linear(header: TensorHeader) -> bool:
    return len(header.shape) == 2 and not header.name.endswith((_EMBEDDING, _HEAD))


def _int8_bytes(shape: Iterable[int]) -> float:
    out, columns = shape
    return out * columns * _EIGHT_BITS + columns * _PERM_BYTES


def _loaded(
    header: TensorHeader, names: set[str], settings: Mapping[str, Any], dtype: torch.dtype
) -> int:
    module, _, leaf = header.name.rpartition(".")
    stored = header.elements * header.itemsize
    bits = int(settings.get("bits", 4))
    digits = 2 if bits == 8 else 1  # of 4 bits, which codes of any width become
    if leaf == "qweight" and f"{module}.qzeros" in names:
        return stored * 4 * digits // bits
    if leaf == "scales" and f"{module}.qzeros" in names:
        return stored * digits
    if leaf == "qzeros":
        # Zeros become numbers in the scales' 16 bits; symmetric ones of 4 bits need none.
        of_digits = header.elements * 32 * digits // bits
        return 0 if settings.get("sym") and bits == 4 else of_digits * 2
    if leaf == "g_idx":
        return stored * digits if settings.get("desc_act") or digits == 2 else 0
    if ".weight." in header.name:  # of bitsandbytes, whose scales become float32
        return header.elements * 4 if leaf == "absmax" else 0
    packed = f"{module}.qweight" in names or f"{module}.weight.absmax" in names
    if packed or not header.floating or header.name.rpartition("|")[2] in _PACKED_FIELDS:
        return stored
    return header.elements * dtype.itemsize
