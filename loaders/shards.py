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


@dataclass(frozen=True)
class Part:
    """A part of a tensor in a file, which is read as a tensor of its own.

    source: the name of the tensor.
    index: the entry of its first dimension; None for the whole tensor.
    share, shares: which part of the rows of that entry, and of how many.
    interleaved: whether the parts' rows take turns instead of being one after another.
    transposed: whether the entry is transposed before rows are taken.
    """

    source: str
    index: int | None = None
    share: int = 0
    shares: int = 1
    interleaved: bool = False
    transposed: bool = False

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part, for the shape of the tensor."""
        if self.index is None:
            return source
        entry = source[1:]
        rows, *others = (*entry[:-2], *entry[:-3:-1]) if self.transposed else entry
        return (rows // self.shares, *others)

    def of(self, entry: Tensor) -> Tensor:
        """The part of an entry."""
        if self.transposed:
            entry = entry.mT
        rows = entry.shape[0] // self.shares
        if self.interleaved:
            return entry[self.share :: self.shares].contiguous()
        return entry[self.share * rows : (self.share + 1) * rows].contiguous()


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
        self._parts: dict[str, Part] = {}
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

    def leave_out(self, prefixes: tuple[str, ...]) -> None:
        """Show no tensors whose names begin with one of ``prefixes``."""
        for name in [name for name in self._file_of if name.startswith(prefixes)]:
            del self._file_of[name]

    def present(self, parts: Mapping[str, Part]) -> None:
        """Show ``parts``, by the names of the tensors they are to be, instead of their sources.

        Call it before anything is read. Raises CheckpointError for a name that is there already.
        """
        for name, part in parts.items():
            if name in self._file_of:
                raise CheckpointError(f"{self.folder} has {name} twice: also in {part.source}")
            self._file_of[name] = self._file_of[part.source]
        for source in {part.source for part in parts.values()}:
            del self._file_of[source]
        self._parts.update(parts)

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
        names_in: dict[Path, list[str]] = {}
        for name, path in self._file_of.items():
            names_in.setdefault(path, []).append(name)
        for path, names in names_in.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    part = self._parts.get(name, Part(name))
                    tensor = file.get_slice(part.source)
                    dtype: str = tensor.get_dtype()
                    bits = _BITS.match(dtype)
                    itemsize = int(bits[1]) // 8 if bits else 1
                    floating = dtype.startswith(("F", "BF"))
                    shape = part.shape(tuple(tensor.get_shape()))
                    yield TensorHeader(name, shape, itemsize, floating)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header of its file."""
        part = self._parts.get(name, Part(name))
        with safe_open(self._file_of[name], framework="pt") as file:
            return part.shape(tuple(file.get_slice(part.source).get_shape()))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor called ``name``; CheckpointError if it is missing or not of ``shape``."""
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        # Opened again for each read: closing drops the mapping, so pages read do not stay resident.
        with safe_open(path, framework="pt") as file:
            part = self._parts.get(name, Part(name))
            tensor: Tensor
            if part.index is None:
                tensor = file.get_tensor(part.source)
            else:
                tensor = part.of(file.get_slice(part.source)[part.index])
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor
