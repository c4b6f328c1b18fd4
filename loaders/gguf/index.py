"""The index of a GGUF model's folder: where each tensor lies, under transformers' names.

``gguf.json`` maps every tensor to its file, its place in it, its shape and type, and what llama.cpp
did to it: rows of queries and keys permuted, 1 added to norms. A tensor in quantized blocks is
named after its type, ``….weight.Q4_K``, and is read as uint8 ``(out, bytes of a row)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.loaders.errors import CheckpointError
from nybble.loaders.tensor_file import TensorHeader, TensorReader

INDEX = "gguf.json"
SOURCE = "gguf_source.json"  # the state of the files that the folder was made from
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor.

    file: beside the index.
    offset: in bytes.
    shape: rows first. Of quantized blocks, the columns are bytes.
    type: of GGUF.
    heads: of a matrix whose rows llama.cpp permuted within each head; 0 for others.
    subtract: what llama.cpp added to every element.
    """

    file: str
    offset: int
    shape: tuple[int, ...]
    type: str
    heads: int = 0
    subtract: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.type, torch.uint8)


def write_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    written = {name: asdict(entry) for name, entry in entries.items()}
    (folder / INDEX).write_text(json.dumps({"tensors": written}))


def gguf_files(folder: Path) -> list[GgufFile]:
    """The files that the index names. Raises CheckpointError if one is gone or truncated."""
    path = folder / INDEX
    try:
        tensors: dict[str, dict[str, Any]] = json.loads(path.read_text())["tensors"]
        entries = {
            name: Entry(**{**about, "shape": tuple(about["shape"])})
            for name, about in tensors.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index of GGUF tensors: {error!r}") from error
    files: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        files.setdefault(entry.file, {})[name] = entry
    return [GgufFile(folder / file, of_file) for file, of_file in files.items()]


class GgufFile:
    """Tensors of one GGUF file."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        """Raises CheckpointError if the file is gone or truncated."""
        self.path = path
        self._entries = entries
        if not path.is_file():
            raise CheckpointError(f"{path.resolve()} is gone, which {path.parent} is made from")
        size = path.stat().st_size
        for name, entry in entries.items():
            end = entry.offset + self._header(name).elements * entry.dtype.itemsize
            if end > size:
                raise CheckpointError(
                    f"{path.resolve()} is truncated: {name} ends at byte {end:,} of {size:,}"
                )

    def names(self) -> list[str]:
        return list(self._entries)

    def headers(self) -> Iterator[TensorHeader]:
        return map(self._header, self._entries)

    def _header(self, name: str) -> TensorHeader:
        entry = self._entries[name]
        floating = entry.dtype.is_floating_point
        return TensorHeader(name, entry.shape, entry.dtype.itemsize, floating)

    def read_entry(self, name: str, index: int) -> Tensor:
        entry = self._entries[name]
        if entry.heads:
            raise ValueError(f"{name} is a matrix, of which entries are rows")
        shape = entry.shape[1:]
        nbytes = math.prod(shape) * entry.dtype.itemsize
        offset = entry.offset + index * nbytes
        stored = np.fromfile(self.path, np.uint8, count=nbytes, offset=offset)
        tensor = torch.from_numpy(stored).view(entry.dtype).view(shape)
        return tensor - entry.subtract if entry.subtract else tensor

    def open(self) -> TensorReader:
        return self

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        nbytes = self._header(name).elements * entry.dtype.itemsize
        stored = np.fromfile(self.path, np.uint8, count=nbytes, offset=entry.offset)
        tensor = torch.from_numpy(stored).view(entry.dtype).view(entry.shape)
        if entry.heads:
            # Within a head, transformers has all first elements of rotated pairs, then all second
            # ones; llama.cpp has the pairs one after another.
            rest = entry.shape[1:]
            tensor = tensor.view(entry.heads, -1, 2, *rest).transpose(1, 2).reshape(entry.shape)
        return tensor - entry.subtract if entry.subtract else tensor
