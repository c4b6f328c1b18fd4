"""What a model folder holds besides weights: config, tokenizer, templates, pooling, …"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats import FORMATS
from nybble.loaders.gguf.index import INDEX as GGUF_INDEX
from nybble.loaders.gguf.index import SOURCE as GGUF_SOURCE

MODULES = "modules.json"  # sentence-transformers' list of modules after the transformer
_LARGEST = 128 << 20  # bytes; tokenizers of a quarter of a million tokens take 40 MB
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_INDEX = ".index.json"
_OWN = ("nybble.json", "origin.json", GGUF_INDEX, GGUF_SOURCE)  # of other forms of the weights


def side_files(folder: Path) -> list[Path]:
    """Files that belong to the model and are not its weights, relative to ``folder``, sorted.

    Weights in the folders of sentence-transformers' modules (``2_Dense``) are included. Left out
    are hidden files, files above 128 MiB, and quantization settings, which describe other weights.
    Raises CheckpointError as :func:`embedding_modules`.
    """
    left_out = {*_OWN, *(format.own_file for format in FORMATS)}
    with_weights = {Path(module.path) for module in embedding_modules(folder) if module.path}
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(top).relative_to(folder)
        for name in names:
            path = inside / name
            weights = name.endswith((*_WEIGHTS, _INDEX)) and inside not in with_weights
            if name.startswith(".") or weights or (inside == Path() and name in left_out):
                continue
            if (folder / path).is_file() and (folder / path).stat().st_size <= _LARGEST:
                found.append(path)
    return sorted(found)


def settings_files(folder: Path) -> list[Path]:
    """Files with quantization settings, relative to ``folder``, beside what config.json says."""
    names = {format.own_file for format in FORMATS if format.own_file is not None}
    return sorted(Path(name) for name in names if (folder / name).is_file())


@dataclass(frozen=True)
class Module:
    """One of sentence-transformers' modules.

    kind: such as ``Pooling``.
    path: its folder, or empty.
    """

    kind: str
    path: str


def embedding_modules(folder: Path) -> list[Module]:
    """The modules that turn the transformer's output into an embedding, from ``modules.json``.

    Empty if there is no such file. Raises CheckpointError for one that cannot be read.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text())
        return [Module(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in modules]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a list of modules: {error!r}") from error


def copy_side_files(source: Path, target: Path) -> None:
    """Copy :func:`side_files`. Raises OSError."""
    for path in side_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, target / path)
