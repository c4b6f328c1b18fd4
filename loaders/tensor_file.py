"""One file of a checkpoint, and what is known of a tensor before it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nybble.loaders.errors import CheckpointError, unreadable

# The digits in the name of a safetensors dtype are its bits.
_BITS = re.compile(r"[A-Z]+(\d+)")


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's entry in the header of its file.

    itemsize: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    floating: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class TensorFile(Protocol):
    """Tensors by name."""

    @property
    def path(self) -> Path: ...

    def names(self) -> list[str]: ...

    def headers(self) -> Iterator[TensorHeader]:
        """The header of every tensor; no tensor data is read."""
        ...

    def open(self) -> TensorReader: ...


class TensorReader(Protocol):
    """Reads tensors of an open file. If they are views of a mapping, all have the same."""

    def read(self, name: str) -> Tensor: ...

    def read_entry(self, name: str, index: int) -> Tensor:
        """``read(name)[index]``; the other entries are not read."""
        ...


@dataclass(frozen=True)
class SafetensorsFile:
    path: Path

    def names(self) -> list[str]:
        """Raises CheckpointError if the file is truncated or not safetensors."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                unreadable(self.path, f"is truncated or not safetensors: {error}")
            ) from error

    def headers(self) -> Iterator[TensorHeader]:
        with safe_open(self.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(name)
                dtype: str = tensor.get_dtype()
                bits = _BITS.match(dtype)
                itemsize = int(bits[1]) // 8 if bits else 1
                floating = dtype.startswith(("F", "BF"))
                yield TensorHeader(name, tuple(tensor.get_shape()), itemsize, floating)

    def open(self) -> TensorReader:
        return _Mapping(safe_open(self.path, framework="pt"))


@dataclass(frozen=True)
class _Mapping:
    """It lasts as long as this or one of the tensors, and so do the pages that were read."""

    file: Any  # a safe_open, whose methods have no types

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def read_entry(self, name: str, index: int) -> Tensor:
        entry: Tensor = self.file.get_slice(name)[index]
        return entry
