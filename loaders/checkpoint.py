"""A checkpoint folder as a stream of weights, whatever its format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.packed import stack_outputs
from nybble.loaders.awq import AwqReader
from nybble.loaders.bnb import BnbReader
from nybble.loaders.errors import CheckpointError
from nybble.loaders.gptq import GptqReader
from nybble.loaders.shards import Shards
from nybble.models import architecture_of

Weight = PackedWeight | DenseWeight | Tensor

_QUANT_METHODS = ("gptq", "awq", "bitsandbytes")


class Checkpoint(Protocol):
    """What an engine loads."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def format(self) -> str: ...

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Weights one at a time, by the module names transformers uses.

        Linear layers are PackedWeight or DenseWeight under the module's name. Those of a group
        (:class:`nybble.models.LinearGroup`) are one weight under the group's name if they can be.
        Norms and embeddings are tensors under ``<module>.weight``.
        """
        ...


class _Reader(Protocol):
    @property
    def name(self) -> str: ...

    def read(self, shards: Shards, module: str) -> PackedWeight | None: ...


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors files in any supported format.

    Raises CheckpointError where something is missing, corrupt or unsupported.
    """
    path = folder / "config.json"
    if (folder / "nybble.json").is_file():
        # Imported here because the packed form is itself written from checkpoints.
        from nybble.loaders.packed_file import PackedCheckpoint

        return PackedCheckpoint(folder)
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: not a model folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each model's validators raise what they like
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return FolderCheckpoint(folder, config, _reader(folder))


def quantization_settings(folder: Path) -> Mapping[str, Any] | None:
    """What config.json, or GPTQ's own file, says of the quantization; None where there is none."""
    config = json.loads((folder / "config.json").read_text())
    settings: Mapping[str, Any] | None = config.get("quantization_config")
    if settings is None and (folder / "quantize_config.json").is_file():
        found = json.loads((folder / "quantize_config.json").read_text())
        settings = {"quant_method": "gptq", **found}
    return settings


def _reader(folder: Path) -> _Reader | None:
    settings = quantization_settings(folder)
    if settings is None:
        return None
    method = settings.get("quant_method")
    try:
        if method == "gptq":
            return GptqReader.from_settings(settings)
        if method == "awq":
            return AwqReader.from_settings(settings)
        if method == "bitsandbytes":
            return BnbReader.from_settings(settings)
    except (TypeError, OverflowError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder / 'config.json'}: a setting of the wrong type in quantization_config: {error}"
        ) from error
    raise CheckpointError(
        f"{folder / 'config.json'}: quant_method {method!r} is not supported; "
        f"supported are {', '.join(_QUANT_METHODS)}"
    )


class FolderCheckpoint:
    """A folder in a public layout."""

    def __init__(self, folder: Path, config: PretrainedConfig, reader: _Reader | None) -> None:
        self.folder = folder
        self.config = config
        self.format = reader.name if reader else "none"
        self.architecture = architecture_of(config)
        self._reader = reader

    def projection(self, shards: Shards, module: str) -> PackedWeight | DenseWeight:
        """The linear layer ``module`` by itself, from this folder's ``shards``."""
        _, weight = self._read(shards, module)
        if isinstance(weight, Tensor):
            raise CheckpointError(f"{self.folder}: {module} is not a linear layer")
        return weight

    def weights(self) -> Iterator[tuple[str, Weight]]:
        shards = Shards(self.folder)
        modules = _modules(shards)
        done: set[str] = set()
        for module in modules:
            if module in done:
                continue
            fused, siblings = self.architecture.fused.get(module, ("", ()))
            if siblings and all(sibling in modules for sibling in siblings):
                done.update(siblings)
                yield from self._fuse(shards, fused, siblings)
            else:
                yield self._read(shards, module)

    def _fuse(
        self, shards: Shards, name: str, modules: Sequence[str]
    ) -> Iterator[tuple[str, Weight]]:
        read = [self._read(shards, module) for module in modules]
        packed = [weight for _, weight in read if isinstance(weight, PackedWeight)]
        dense = [weight for _, weight in read if isinstance(weight, DenseWeight)]
        if len(packed) == len(read):
            whole = stack_outputs(packed)
            if whole is not None:
                yield name, whole
                return
        elif len(dense) == len(read) and len({weight.bias is None for weight in dense}) == 1:
            biases = [weight.bias for weight in dense if weight.bias is not None]
            yield (
                name,
                DenseWeight(
                    torch.cat([weight.weight for weight in dense]),
                    torch.cat(biases) if biases else None,
                ),
            )
            return
        yield from read

    def _read(self, shards: Shards, module: str) -> tuple[str, Weight]:
        packed = self._reader.read(shards, module) if self._reader else None
        if packed is not None:
            return module, packed
        name = module + ".weight"
        if name not in shards:
            raise CheckpointError(
                f"{self.folder}: {module} has no weight in the checkpoint's format "
                f"({self.format}); is it a mixture of formats?"
            )
        weight = shards.read(name)
        if not weight.is_floating_point():
            raise CheckpointError(
                f"{self.folder}: {name} is {weight.dtype}, expected a floating-point tensor; "
                f"the checkpoint's format is {self.format}"
            )
        if weight.ndim != 2 or module.endswith("embed_tokens"):
            return name, weight
        bias = module + ".bias"
        return module, DenseWeight(
            weight, shards.read(bias, (weight.shape[0],)) if bias in shards else None
        )


def _modules(shards: Shards) -> dict[str, None]:
    """Modules that own tensors, in the order of the files."""
    modules: dict[str, None] = {}
    for name in shards.names():
        module, _, leaf = name.rpartition(".")
        if ".weight." in name:  # bitsandbytes hangs its state below the weight
            module = name.split(".weight.")[0]
        elif leaf == "inv_freq":  # a buffer old checkpoints carry; computed here
            continue
        modules[module] = None
    return modules
