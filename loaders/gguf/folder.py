"""From a GGUF file to a model's folder in the cache, which refers to the file's tensors.

The folder has config.json, the tokenizer's files and generation_config.json, all made from the
file's metadata, ``gguf.json`` (:mod:`nybble.loaders.gguf.index`), and links to the file or to the
parts it is split into. It is made once, and again if the file has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGUFReader,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf.gguf_reader import ReaderTensor
from transformers import AutoConfig

from nybble.loaders.cache import cache_folder
from nybble.loaders.errors import CheckpointError, unreadable
from nybble.loaders.formats.gguf_blocks import BLOCK_TYPES
from nybble.loaders.gguf.config import FAMILIES, ROPE_FACTORS, ROPE_FREQS, Metadata, config_of
from nybble.loaders.gguf.index import DTYPES, SOURCE, Entry, write_index
from nybble.loaders.gguf.names import parts_of
from nybble.loaders.gguf.tokenizer import end_tokens, save_tokenizer
from nybble.loaders.output_folder import whole_folder
from nybble.models import Architecture, Attention, Mixture, Mlp, architecture_of

VERSION = 4
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def gguf_folder(file: Path) -> Path:
    """The model's folder of a GGUF file, made if need be.

    Raises CheckpointError if the file is damaged, or has something that is not supported.
    """
    # The file's own name: in the hub's cache it is a link to one that says nothing.
    file = file.parent.resolve() / file.name
    parts = _parts(file)
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    stats = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    source = json.dumps({"version": VERSION, "files": stats})
    with FileLock(folder.with_name(folder.name + ".lock")):
        if _read(folder / SOURCE) != source:
            with whole_folder(folder) as scratch:
                write_folder(parts, scratch)
                (scratch / SOURCE).write_text(source)
    return folder


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _parts(file: Path) -> list[Path]:
    parts = [file.with_name(name) for name in parts_of(file.name)]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(
                f"{file} is one part of {len(parts)}, and there is no {part.name}"
            )
    return parts


def write_folder(parts: Sequence[Path], folder: Path) -> None:
    """Write config, tokenizer, index and links to ``folder``. Raises as :func:`gguf_folder`."""
    readers = {part: _reader(part) for part in parts}
    file, metadata = parts[0], readers[parts[0]].fields
    tensors = {
        tensor.name: (part, tensor) for part, reader in readers.items() for tensor in reader.tensors
    }
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{file} has no token_embd.weight: not a language model")
    architecture = str(metadata["general.architecture"].contents())
    prefix = architecture + "."
    settings = {
        name.removeprefix(prefix): field.contents()
        for name, field in metadata.items()
        if name.startswith(prefix)
    }
    config = config_of(
        architecture,
        Metadata(str(file), settings, tensors.keys()),
        vocab=int(tensors["token_embd.weight"][1].shape[1]),
        rope_tensors={
            name: torch.from_numpy(np.array(tensors[name][1].data, dtype=np.float32))
            for name in (ROPE_FREQS, *ROPE_FACTORS)
            if name in tensors
        },
    )
    if any(tensor.tensor_type.name in BLOCK_TYPES for _, tensor in tensors.values()):
        config["quantization_config"] = {"quant_method": "gguf"}
    for token, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        found = metadata.get(f"tokenizer.ggml.{name}_token_id")
        config[f"{token}_token_id"] = None if found is None else int(found.contents())
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_index(folder, _entries(folder, architecture, readers, tensors))
    for part in parts:
        (folder / part.name).symlink_to(part)
    tokenizer = save_tokenizer(file, metadata, folder)
    generation = {"eos_token_id": end_tokens(metadata, tokenizer)}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _reader(part: Path) -> GGUFReader:
    try:
        reader = GGUFReader(part)
        reader.fields["general.architecture"]
        return reader
    except Exception as error:  # it raises errors of any type for damaged files
        raise CheckpointError(unreadable(part, f"is truncated or not GGUF: {error}")) from error


def _entries(
    folder: Path,
    architecture: str,
    readers: Mapping[Path, GGUFReader],
    tensors: Mapping[str, tuple[Path, ReaderTensor]],
) -> dict[str, Entry]:
    """The index. Raises CheckpointError for a tensor that is missing, or not of the model."""
    model = architecture_of(AutoConfig.from_pretrained(folder, local_files_only=True))
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    kind: MODEL_ARCH = kinds[architecture]
    names = get_tensor_name_map(kind, len(model.layers))
    family, entries = FAMILIES[architecture], dict[str, Entry]()
    file = next(iter(readers))
    used = {ROPE_FREQS, *ROPE_FACTORS}
    experts = max(
        (len(each.mlp.experts) for each in model.layers if isinstance(each.mlp, Mixture)), default=0
    )
    for name, heads, is_norm in _names(model):
        stored = _stored_name(names, name)
        if stored not in tensors:
            continue
        used.add(stored)
        part, tensor = tensors[stored]
        expert = _EXPERT.search(name)
        entries |= _entry(
            part,
            tensor,
            name,
            heads=heads if family.permuted else 0,
            subtract=family.norm_offset if is_norm and name.endswith(".weight") else 0.0,
            expert=None if expert is None else int(expert[1]),
            experts=experts,
        )
    for name in tensors:
        if name not in used:
            raise CheckpointError(f"{file}: nothing here reads the tensor {name}")
    for index, layer in enumerate(model.layers):
        if isinstance(layer.mlp, Mlp) and layer.mlp.xielu is not None:
            for name in layer.mlp.xielu.tensors:
                key = f"xielu.{name.rpartition('.')[2]}"
                entries[model.module(index, name)] = _number(file, readers[file], key, index)
    return entries


def _stored_name(names: TensorNameMap, name: str) -> str:
    """A tensor's name in the file, in which those of all experts are one."""
    name = _EXPERT.sub(".experts.", name)
    for suffix, leaf in (
        (".weight", "weight"),
        (".bias", "bias"),
        ("_bias", "bias"),
        ("", "weight"),
    ):
        base = names.get_name(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if base is not None:
            return f"{base}.{leaf}"
    return name


def _names(model: Architecture) -> Iterator[tuple[str, int, bool]]:
    """Every tensor's name, the heads its rows belong to if it is of q or k, and if of a norm."""
    for module in (model.embedding, model.head):
        yield from _of_module(module, 0, False)
    for index, layer in enumerate(model.layers):
        heads = {}
        for mixer in layer.mixers:
            if isinstance(mixer, Attention):
                heads = {"q_proj": mixer.heads, "k_proj": mixer.kv_heads}
        for linear in layer.linears:
            yield from _of_module(
                model.module(index, linear.name), heads.get(linear.leaf, 0), False
            )
        for name in layer.tensors:
            yield model.module(index, name), 0, False
    for norm in model.norms:
        yield from _of_module(norm, 0, True)


def _of_module(module: str, heads: int, is_norm: bool) -> Iterator[tuple[str, int, bool]]:
    for leaf in ("weight", "bias"):
        yield f"{module}.{leaf}", heads, is_norm


def _number(file: Path, reader: GGUFReader, key: str, index: int) -> Entry:
    """The number ``index`` of a list in the metadata, as a tensor; or the one for all layers."""
    field = reader.fields.get(key)
    found = [] if field is None else [field.parts[at] for at in field.data]
    if len(found) != 1 and len(found) <= index:
        raise CheckpointError(f"{file} has no {key} of layer {index}")
    number = found[index if len(found) > 1 else 0]
    if number.dtype != np.float32:
        raise CheckpointError(f"{file}: {key} is not a list of float32 numbers")
    shape = (1,) if "alpha" in key else ()  # as transformers has them
    return Entry(file.name, number.ctypes.data - reader.data.ctypes.data, shape, "F32")


def _entry(
    part: Path,
    tensor: ReaderTensor,
    name: str,
    *,
    heads: int,
    subtract: float,
    expert: int | None,
    experts: int,
) -> dict[str, Entry]:
    """expert: whose tensor it is, in one of all ``experts``; None for the whole tensor."""
    kind, offset = tensor.tensor_type.name, int(tensor.data_offset)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if expert is not None:
        if shape[0] != experts:
            raise CheckpointError(
                f"{part}: {tensor.name} holds {shape[0]} experts, but the metadata says {experts}"
            )
        offset += int(tensor.n_bytes) // experts * expert
        shape = shape[1:]
    if kind in BLOCK_TYPES:
        block = BLOCK_TYPES[kind]
        if len(shape) != 2 or shape[1] % block.weights:
            raise CheckpointError(f"{part}: {tensor.name} has shape {shape} in {kind} blocks")
        shape = (shape[0], shape[1] // block.weights * block.nbytes)
        name = f"{name}.{kind}"
    elif kind not in DTYPES:
        known = ", ".join((*DTYPES, *BLOCK_TYPES))
        raise CheckpointError(
            f"{part}: {tensor.name} is of type {kind}, which is not supported; supported are "
            f"{known}"
        )
    if name.endswith("_gate.weight") and len(shape) == 1:  # of a shared expert: one row
        shape = (1, *shape)
    return {name: Entry(part.name, offset, shape, kind, heads, subtract)}
