"""The safetensors files of a checkpoint folder, read one tensor at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nybble.loaders.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


_COMPUTED = "inv_freq"  # a buffer in old checkpoints, not read: we compute it

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


def module_and_leaf(name: str) -> tuple[str, str]:
    """``a.b.weight`` is ``weight`` of ``a.b``; ``a.b.weight.absmax`` is ``weight.absmax`` of it."""
    module, below, rest = name.partition(".weight.")
    if below:
        return module, f"weight.{rest}"
    module, _, leaf = name.rpartition(".")
    return module, leaf


class Shards:
    """Tensors by name over one file or several; memory-mapped, never unpickled."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if files are missing, truncated or not safetensors."""
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for path in self._files():
            try:
                with safe_open(path, framework="pt") as file:
                    names = file.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or not safetensors: {error}") from error
            self._file_of.update(dict.fromkeys(names, path))
        self._check_index()

    def _files(self) -> list[Path]:
        if (self.folder / _INDEX).is_file():
            files = sorted({self.folder / name for name in self._index().values()})
            for path in files:
                if not path.is_file():
                    raise CheckpointError(f"{self.folder / _INDEX} names {path.name}: not there")
            return files
        if (self.folder / _SINGLE).is_file():
            return [self.folder / _SINGLE]
        if files := sorted(self.folder.glob("*.safetensors")):
            return files
        if any(self.folder.glob("*.bin")):
            raise CheckpointError(
                f"{self.folder} has only pickled .bin weights, which can run code when loaded; "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{self.folder} has no .safetensors file")

    def _index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        try:
            weight_map: dict[str, str] = json.loads(path.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a safetensors index: {error!r}") from error
        return weight_map

    def _check_index(self) -> None:
        if (self.folder / _INDEX).is_file():
            for name, file in self._index().items():
                if name not in self._file_of:
                    raise CheckpointError(f"{self.folder / file} has no tensor {name}")

    def names(self) -> list[str]:
        return list(self._file_of)

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, str]]:
        """Modules in file order, each with its tensors: leaf name → full name."""
        modules: dict[str, dict[str, str]] = {}
        for name in self._file_of:
            module, leaf = module_and_leaf(name)
            if leaf != _COMPUTED:
                modules.setdefault(module, {})[leaf] = name
        return modules

    def headers(self) -> Iterator[TensorHeader]:
        """The header of every tensor; no tensor data is read."""
        for path in dict.fromkeys(self._file_of.values()):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensor = file.get_slice(name)
                    dtype: str = tensor.get_dtype()
                    bits = _BITS.match(dtype)
                    itemsize = int(bits[1]) // 8 if bits else 1
                    floating = dtype.startswith(("F", "BF"))
                    yield TensorHeader(name, tuple(tensor.get_shape()), itemsize, floating)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor called ``name``; CheckpointError if it is missing or not of ``shape``."""
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        # Opened again for each read: closing drops the mapping, so pages read do not stay resident.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor
