"""The tensors of a checkpoint folder, read one at a time from safetensors or GGUF files."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from nybble.loaders.errors import CheckpointError, unreadable
from nybble.loaders.gguf.index import INDEX as GGUF_INDEX
from nybble.loaders.gguf.index import gguf_files
from nybble.loaders.tensor_file import SafetensorsFile, TensorFile, TensorHeader, TensorReader
from nybble.models import Architecture

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


# What is read by one mapping of a file. One for each tensor would not do: Linux allows a process
# 65,530, and the experts of a large mixture have more tensors. Nor would one for the file: until it
# ends, all pages that were read stay resident, also of tensors that were rounded and let go.
_MAPPED_BYTES = 32 << 20

_BACKBONE = re.compile(r"^backbone\.")
_LANGUAGE_MODEL = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.*)")
_OTHER_PARTS = re.compile(
    r"(?:model\.)?"
    r"(?:vision_tower|vision_model|visual|multi_modal_projector|image_newline)(?:\.|$)"
)
_COMPUTED = "inv_freq"  # a buffer in old checkpoints, not read: we compute it


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

    def entry_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the entry that has a part of this shape."""
        rows, *others = part
        whole = (rows * self.shares, *others)
        return (*whole[:-2], *whole[:-3:-1]) if self.transposed else whole

    def of(self, entry: Tensor) -> Tensor:
        """The part of an entry."""
        return self._view(entry).contiguous()

    def put(self, entry: Tensor, part: Tensor) -> None:
        """Write the part into an entry, the inverse of :meth:`of`."""
        self._view(entry).copy_(part)

    def _view(self, entry: Tensor) -> Tensor:
        if self.transposed:
            entry = entry.mT
        rows = entry.shape[0] // self.shares
        if self.interleaved:
            return entry[self.share :: self.shares]
        return entry[self.share * rows : (self.share + 1) * rows]


def module_and_leaf(name: str) -> tuple[str, str]:
    """``a.b.weight`` is ``weight`` of ``a.b``; ``a.b.weight.absmax`` is ``weight.absmax`` of it."""
    module, below, rest = name.partition(".weight.")
    if below:
        return module, f"weight.{rest}"
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _of_language_model(stored: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Names of tensors with the names they are stored under, and the other parts' tensors.

    A model that was saved without what is after its last norm, as models of embeddings are, has no
    ``model.`` in its names. Nemotron-H has ``backbone.`` instead.
    """
    if "embed_tokens.weight" in stored:
        own = ("lm_head.", "score.")
        return {name if name.startswith(own) else f"model.{name}": name for name in stored}, []
    if not any(_LANGUAGE_MODEL.match(name) for name in stored):
        return {_BACKBONE.sub("model.", name): name for name in stored}, []
    names, others = {}, []
    for name in stored:
        if (match := _LANGUAGE_MODEL.match(name)) is not None:
            rest = match[1]
            names[rest if rest.startswith("lm_head.") else f"model.{rest}"] = name
        elif _OTHER_PARTS.match(name):
            others.append(name)
        else:
            names[name] = name
    return names, others


def weight_files(folder: Path, names: Collection[str]) -> list[str]:
    """The safetensors files that hold the weights of a folder, sorted.

    names: the files that the folder has, or is to have; one in a folder below it holds none.
    An index in it may name others, and a model that is both in the files of an index and in
    model.safetensors has them all.

    Raises CheckpointError for an index that cannot be read.
    """
    if (folder / _INDEX).is_file():
        single = {_SINGLE}.intersection(names)
        return sorted({*read_index(folder).values(), *single})
    if _SINGLE in names:
        return [_SINGLE]
    return sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor by the folder's index, empty if it has none.

    Raises CheckpointError for one that cannot be read.
    """
    path = folder / _INDEX
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(unreadable(path, f"is not a safetensors index: {error!r}")) from error


class Shards:
    """Tensors by name over one file or several; memory-mapped, never unpickled.

    Tensors of a multimodal model's language model have the names that it would have by itself.

    other_parts: the tensors of a multimodal model's other parts, which cannot be read.
    """

    def __init__(self, folder: Path, architecture: Architecture | None = None) -> None:
        """architecture: of what is read; None to show all tensors that are stored.

        Raises CheckpointError if files are missing, truncated or in another format. With an
        architecture, also for a tensor of it which the index names and no file has.
        """
        self.folder = folder
        self._file_of: dict[str, TensorFile] = {}
        places = read_index(folder)
        for file in self._files():
            for name in file.names():
                other = self._file_of.get(name)
                if other is not None and name not in places:
                    raise CheckpointError(
                        f"the tensor {name} is in {other.path} and in {file.path}: remove the file "
                        "that does not belong to the model"
                    )
                if other is None or folder / places[name] == file.path:
                    self._file_of[name] = file
        absent = [] if architecture is None else [n for n in places if n not in self._file_of]
        self._stored, others = _of_language_model([*self._file_of, *absent])
        self.other_parts = [name for name in others if name in self._file_of]
        if architecture is not None:
            self._select(architecture)
        for name, stored in list(self._stored.items()):
            if stored not in self._file_of:
                if module_and_leaf(name)[1] != _COMPUTED:
                    raise CheckpointError(f"{folder / places[stored]} has no tensor {stored}")
                del self._stored[name]
        self._parts: dict[str, Part] = {}
        # The file that was read last, what reads it, and how many bytes it has read.
        self._last: tuple[TensorFile, TensorReader, int] | None = None

    def _files(self) -> Sequence[TensorFile]:
        if (self.folder / GGUF_INDEX).is_file():
            return gguf_files(self.folder)
        return [SafetensorsFile(path) for path in self._paths()]

    def _paths(self) -> list[Path]:
        single = self.folder / _SINGLE
        if (self.folder / _INDEX).is_file():
            files = sorted({self.folder / name for name in read_index(self.folder).values()})
            for path in files:
                if not path.is_file():
                    raise CheckpointError(f"{self.folder / _INDEX} names {path.name}: not there")
            # transformers would read the single file alone, and say nothing of the others.
            if single.is_file() and single not in files:
                raise CheckpointError(
                    f"{self.folder} has two models: {_SINGLE}, and the files that {_INDEX} names, "
                    f"such as {files[0].name}; remove {_SINGLE}, or the index and its files"
                )
            return files
        names = [path.name for path in self.folder.glob("*.safetensors")]
        if files := [self.folder / name for name in weight_files(self.folder, names)]:
            return files
        if any(self.folder.glob("*.bin")):
            raise CheckpointError(
                f"{self.folder} has only pickled .bin weights, which can run code when loaded; "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{self.folder} has no .safetensors file")

    def _select(self, architecture: Architecture) -> None:
        """Show what is read, under the names that the architecture has."""
        if architecture.tied:
            self._tie(architecture.embedding, architecture.head)
        only = architecture.only or ("",)
        self._stored = {
            name: stored
            for name, stored in self._stored.items()
            if name.startswith(only) and not name.startswith(architecture.unused)
        }

    def _tie(self, embedding: str, head: str) -> None:
        """Let the one matrix of a model whose output layer is its embedding be the embedding.

        safetensors' save_model keeps of a matrix's two names the first by the alphabet.
        """
        stored = self._stored.get(head + ".weight")
        there = [name for name, at in self._stored.items() if at in self._file_of]
        if stored in self._file_of and not any(n.startswith(embedding + ".") for n in there):
            self._stored[embedding + ".weight"] = stored
            del self._stored[head + ".weight"]
        elif stored is not None and stored not in self._file_of:
            del self._stored[head + ".weight"]

    def present(self, parts: Mapping[str, Part]) -> None:
        """Show ``parts``, by the names of the tensors they are to be, instead of their sources.

        Call it before anything is read. Raises CheckpointError for a name that is there already.
        """
        for name, part in parts.items():
            if name in self._stored:
                raise CheckpointError(f"{self.folder} has {name} twice: also in {part.source}")
            self._stored[name] = self._stored[part.source]
        for source in {part.source for part in parts.values()}:
            del self._stored[source]
        self._parts.update(parts)

    @property
    def parts(self) -> Mapping[str, Part]:
        """What is shown instead of its source."""
        return self._parts

    def names(self) -> list[str]:
        return list(self._stored)

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, str]]:
        """Modules in file order, each with its tensors: leaf name → full name."""
        modules: dict[str, dict[str, str]] = {}
        for name in self._stored:
            module, leaf = module_and_leaf(name)
            if leaf != _COMPUTED:
                modules.setdefault(module, {})[leaf] = name
        return modules

    def headers(self) -> Iterator[TensorHeader]:
        """The header of every tensor; no tensor data is read."""
        names_of: dict[str, list[str]] = {}
        for name, stored in self._stored.items():
            names_of.setdefault(stored, []).append(name)
        for file in dict.fromkeys(self._file_of.values()):
            for header in file.headers():
                for name in names_of.get(header.name, ()):
                    part = self._parts.get(name)
                    shape = header.shape if part is None else part.shape(header.shape)
                    yield replace(header, name=name, shape=shape)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor called ``name``; CheckpointError if it is missing or not of ``shape``."""
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        file, part = self._file_of[stored], self._parts.get(name)
        index = None if part is None else part.index
        tensor = self._read(file, stored, index)
        if part is not None and index is not None:
            tensor = part.of(tensor)
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{file.path}: {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor

    def _read(self, file: TensorFile, name: str, index: int | None) -> Tensor:
        """The tensor or its entry. Those that are read one after another share a mapping."""
        if self._last is None or self._last[0] is not file or self._last[2] > _MAPPED_BYTES:
            self._last = file, file.open(), 0
        _, reader, done = self._last
        tensor = reader.read(name) if index is None else reader.read_entry(name, index)
        self._last = file, reader, done + tensor.nbytes
        return tensor
