"""A model folder written shard by shard, complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.loaders.adapter_settings import TEMPLATE, TOKENIZER
from nybble.loaders.adapter_tokens import TOKEN_FILES
from nybble.loaders.model_files import copy_side_files
from nybble.loaders.output_folder import whole_folder
from nybble.loaders.safetensors_file import write_safetensors
from nybble.loaders.shards import Part
from nybble.quantizers.stacked_experts import Stacker

_SHARD_BYTES = 1 << 30


@contextmanager
def folder_writer(
    target: Path,
    source: Path,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    parts: Mapping[str, Part] | None = None,
) -> Iterator[FolderWriter]:
    """What writes the tensors of ``target``, which appears only if the block raises nothing.

    ``config`` becomes config.json; tokenizer and the like are copied from ``source``.

    tokenizer: instead of the source's.
    parts: which of the tensors are written as parts of others
        (:func:`nybble.quantizers.stacked_experts.parts_to_write`).

    Raises FileExistsError if the target has content, OSError if it cannot be written.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")
    with whole_folder(target) as folder:
        writer = FolderWriter(folder, Stacker(parts or {}))
        yield writer
        writer.finish()
        copy_side_files(source, folder)
        if tokenizer is not None:
            for name in (*TOKEN_FILES, TOKENIZER, TEMPLATE):
                (folder / name).unlink(missing_ok=True)
            tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2))


class FolderWriter:
    """Writes a model's tensors to a folder, in files of about a gibibyte and an index of them."""

    def __init__(self, folder: Path, stacker: Stacker) -> None:
        """stacker: makes those that are written as parts of others."""
        self._folder = folder
        self._stacker = stacker
        self._shard: dict[str, Tensor] = {}
        self._bytes = 0
        self._weight_map: dict[str, str] = {}
        self._files: list[Path] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        whole = self._stacker.take(tensors)
        self._shard.update({name: tensor.cpu().contiguous() for name, tensor in whole.items()})
        self._bytes += sum(tensor.nbytes for tensor in whole.values())
        if self._bytes >= _SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        path = self._folder / f"model-{len(self._files) + 1:05}.safetensors"
        write_safetensors(self._shard, path, {"format": "pt"})
        self._weight_map.update(dict.fromkeys(self._shard, path.name))
        self._files.append(path)
        self._shard, self._bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, and the index if there are several files."""
        if self._shard:
            self._flush()
        if len(self._files) == 1:
            self._files[0].rename(self._folder / "model.safetensors")
        else:
            index = {"metadata": {}, "weight_map": self._weight_map}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index))
