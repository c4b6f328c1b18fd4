"""From a GGUF file to a model's folder in the cache, which refers to the file's tensors.

The folder has config.json, the tokenizer's files and generation_config.json, all made from the
file's metadata, ``gguf.json`` (:mod:`nybble.loaders.gguf.index`), and links to the file or to the
parts it is split into. It is made once, and again if the file has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from gguf.gguf_reader import ReaderTensor
from transformers import AutoConfig

from nybble.loaders.cache import cache_folder
from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.gguf_blocks import BLOCK_TYPES
from nybble.loaders.gguf.config import FAMILIES, ROPE_FACTORS, ROPE_FREQS, Metadata, config_of
from nybble.loaders.gguf.index import DTYPES, SOURCE, Entry, write_index
from nybble.loaders.gguf.names import parts_of
from nybble.loaders.gguf.tokenizer import end_tokens, save_tokenizer
from nybble.models import Architecture, Attention, architecture_of

VERSION = 2


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
            scratch = folder.with_name(folder.name + ".partial")
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                scratch.mkdir()
                write_folder(parts, scratch)
                (scratch / SOURCE).write_text(source)
                shutil.rmtree(folder, ignore_errors=True)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
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
    readers = [_reader(part) for part in parts]
    file, metadata = parts[0], readers[0].fields
    tensors = {
        tensor.name: (part, tensor)
        for part, reader in zip(parts, readers, strict=True)
        for tensor in reader.tensors
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
    write_index(folder, _entries(folder, architecture, file, tensors))
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
        raise CheckpointError(f"{part} is truncated or not GGUF: {error}") from error


def _entries(
    folder: Path,
    architecture: str,
    file: Path,
    tensors: Mapping[str, tuple[Path, ReaderTensor]],
) -> dict[str, Entry]:
    """The index. Raises CheckpointError for a tensor that is missing, or not of the model."""
    model = architecture_of(AutoConfig.from_pretrained(folder, local_files_only=True))
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    kind: MODEL_ARCH = kinds[architecture]
    names = get_tensor_name_map(kind, len(model.layers))
    entries: dict[str, Entry] = {}
    used = {ROPE_FREQS, *ROPE_FACTORS}
    for module, heads, is_norm in _modules(model):
        base = names.get_name(module)
        for leaf in ("weight", "bias"):
            found = tensors.get(f"{base}.{leaf}")
            if found is None:
                continue
            used.add(f"{base}.{leaf}")
            part, tensor = found
            entries.update(
                _entry(
                    part,
                    tensor,
                    f"{module}.{leaf}",
                    heads if FAMILIES[architecture].permuted else 0,
                    FAMILIES[architecture].norm_offset if is_norm and leaf == "weight" else 0.0,
                )
            )
    for name in tensors:
        if name not in used:
            raise CheckpointError(f"{file}: nothing here reads the tensor {name}")
    return entries


def _modules(model: Architecture) -> Iterator[tuple[str, int, bool]]:
    """Every module with weights, the heads its rows belong to if it is of q or k, and if a norm."""
    yield model.embedding, 0, False
    yield model.head, 0, False
    for index, layer in enumerate(model.layers):
        heads = {}
        if isinstance(layer.mixer, Attention):
            heads = {"q_proj": layer.mixer.heads, "k_proj": layer.mixer.kv_heads}
        for linear in layer.linears:
            yield model.module(index, linear.name), heads.get(linear.leaf, 0), False
    for norm in model.norms:
        yield norm, 0, True


def _entry(
    part: Path, tensor: ReaderTensor, name: str, heads: int, subtract: float
) -> dict[str, Entry]:
    kind = tensor.tensor_type.name
    shape = tuple(int(n) for n in reversed(tensor.shape))
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
    entry = Entry(part.name, int(tensor.data_offset), shape, kind, heads, subtract)
    return {name: entry}
