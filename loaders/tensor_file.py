"""One file of a checkpoint, and what is known of a tensor before it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nybble.loaders.errors import CheckpointError

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

    def read(self, name: str) -> Tensor: ...

    def read_entry(self, name: str, index: int) -> Tensor:
        """``read(name)[index]``; the other entries are not read."""
        ...

    def many(self) -> Callable[[str], Tensor]:
        """``read`` for many tensors that are to stay; a file that is mapped is mapped once."""
        ...


@dataclass(frozen=True)
class SafetensorsFile:
    """Opened again for each read: closing drops the mapping, so pages read do not stay resident."""

    path: Path

    def names(self) -> list[str]:
        """Raises CheckpointError if the file is truncated or not safetensors."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path} is truncated or not safetensors: {error}"
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

    def read(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def many(self) -> Callable[[str], Tensor]:
        read: Callable[[str], Tensor] = safe_open(self.path, framework="pt").get_tensor
        return read

    def read_entry(self, name: str, index: int) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            entry: Tensor = file.get_slice(name)[index]
            return entry
