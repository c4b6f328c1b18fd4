"""A model folder written shard by shard, complete or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.loaders.adapter_settings import TEMPLATE, TOKENIZER
from nybble.loaders.adapter_tokens import TOKEN_FILES
from nybble.loaders.model_files import copy_side_files
from nybble.loaders.safetensors_file import write_safetensors
from nybble.loaders.shards import Part
from nybble.quantizers.stacked_experts import Stacker

_SHARD_BYTES = 1 << 30


class FolderWriter:
    """A context manager: ``target`` appears only if the ``with`` block raises nothing."""

    def __init__(
        self,
        target: Path,
        source: Path,
        config: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        """``config`` becomes config.json; tokenizer and the like are copied from ``source``.

        tokenizer: instead of the source's.
        parts: which of the tensors are written as parts of others
            (:func:`nybble.quantizers.stacked_experts.parts_to_write`).

        Raises FileExistsError if the target has content.
        """
        self._tokenizer = tokenizer
        if target.exists() and any(target.iterdir()):
            raise FileExistsError(f"{target} is not empty")
        self._target, self._source, self._config = target, source, config
        self._scratch = target.with_name(target.name + ".partial")
        self._stacker = Stacker(parts or {})
        self._shard: dict[str, Tensor] = {}
        self._bytes = 0
        self._weight_map: dict[str, str] = {}
        self._files: list[Path] = []

    def __enter__(self) -> FolderWriter:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        return self

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        whole = self._stacker.take(tensors)
        self._shard.update({name: tensor.cpu().contiguous() for name, tensor in whole.items()})
        self._bytes += sum(tensor.nbytes for tensor in whole.values())
        if self._bytes >= _SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        path = self._scratch / f"model-{len(self._files) + 1:05}.safetensors"
        write_safetensors(self._shard, path, {"format": "pt"})
        self._weight_map.update(dict.fromkeys(self._shard, path.name))
        self._files.append(path)
        self._shard, self._bytes = {}, 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:  # also if the disk is full, or Ctrl-C is pressed, only now
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _finish(self) -> None:
        if self._shard:
            self._flush()
        if len(self._files) == 1:
            self._files[0].rename(self._scratch / "model.safetensors")
        else:
            index = {"metadata": {}, "weight_map": self._weight_map}
            (self._scratch / "model.safetensors.index.json").write_text(json.dumps(index))
        copy_side_files(self._source, self._scratch)
        if self._tokenizer is not None:
            for name in (*TOKEN_FILES, TOKENIZER, TEMPLATE):
                (self._scratch / name).unlink(missing_ok=True)
            self._tokenizer.save_pretrained(self._scratch)
        (self._scratch / "config.json").write_text(json.dumps(self._config, indent=2))
        shutil.rmtree(self._target, ignore_errors=True)
        self._scratch.rename(self._target)
