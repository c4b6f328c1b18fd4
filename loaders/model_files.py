"""What a model folder holds besides weights: config, tokenizer, templates, pooling, …"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from nybble.loaders.formats import FORMATS

MODULES = "modules.json"  # of sentence-transformers: what follows the transformer
_LARGEST = 128 << 20  # bytes; tokenizers of a quarter of a million tokens take 40 MB
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_INDEX = ".index.json"
_OWN = ("nybble.json", "origin.json")  # of the packed form


def side_files(folder: Path) -> list[Path]:
    """Files that belong to the model and are not its weights, relative to ``folder``, sorted.

    Weights in the folders of sentence-transformers' modules (``2_Dense``) do belong to it. Left
    out are hidden files, files above 128 MiB, and what said how other weights were quantized.
    """
    left_out = {*_OWN, *(format.own_file for format in FORMATS)}
    with_weights = {Path(path) for path in module_folders(folder)}
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


def module_folders(folder: Path) -> dict[str, str]:
    """Folders of sentence-transformers' modules and their types, the transformer's own left out."""
    try:
        modules = json.loads((folder / MODULES).read_text())
        return {str(m["path"]): str(m["type"]) for m in modules if m["path"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # its reader names what is wrong with it


def copy_side_files(source: Path, target: Path) -> None:
    """Copy :func:`side_files`. Raises OSError."""
    for path in side_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, target / path)
