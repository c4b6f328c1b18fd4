"""A checkpoint folder as a stream of weights, whatever its format."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.packed import stack_outputs
from nybble.loaders.errors import CheckpointError
from nybble.loaders.experts import open_shards
from nybble.loaders.formats import FORMATS, Format, format_of, unknown_settings
from nybble.loaders.memory import trimmed
from nybble.loaders.model_config import load_config
from nybble.loaders.shards import Shards, module_and_leaf
from nybble.models import Architecture, UnsupportedModelError, architecture_of

logger = logging.getLogger(__name__)

Weight = PackedWeight | DenseWeight | Tensor

_DENSE = frozenset(("weight", "bias"))
# Where configs name modules that are not quantized, or have settings of their own.
_LEFT_OUT = (
    "dynamic",
    "extra_config",
    "ignore",
    "llm_int8_skip_modules",
    "modules_in_block_to_quantize",
    "modules_to_not_convert",
    "skip_modules",
)


class Checkpoint(Protocol):
    """A model which an engine can load."""

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


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors files in any supported format.

    Raises CheckpointError if something is missing, corrupt or unsupported, and
    UnsupportedModelError naming the families that are supported.
    """
    if (folder / "nybble.json").is_file():
        # Imported here to avoid a cycle: packed_file imports this module.
        from nybble.loaders.packed_file import PackedCheckpoint

        return PackedCheckpoint(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: not a model folder")
    config = load_config(folder)
    try:
        return FolderCheckpoint(folder, config, format_of(folder))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{folder / 'config.json'}: {error}") from error


def can_be_rounded(checkpoint: Checkpoint) -> bool:
    """Whether the weights are 16-bit once loaded, so that they can be quantized in flight."""
    own = checkpoint.quantization if isinstance(checkpoint, FolderCheckpoint) else None
    return checkpoint.format == "none" or (own is not None and own.in_16_bits)


class FolderCheckpoint:
    """A folder in a public layout.

    quantization: how it is quantized, None for 16 bits.
    architecture: what is read of it.
    """

    def __init__(
        self,
        folder: Path,
        config: PretrainedConfig,
        format: Format | None,
        part: Architecture | None = None,
    ) -> None:
        """part: what to read of it; None for the model that the config describes."""
        self.folder = folder
        self.config = config
        self.quantization = format
        self.format = format.name if format else "none"
        self.architecture = part or architecture_of(config)

    def check(self, shards: Shards) -> None:
        """Check the names of all tensors.

        Raises CheckpointError for a tensor that no reader here knows, and for a missing one that a
        quantized module or the family needs. Ignoring either would silently change the model.
        """
        self._require_modules(shards)
        biased = {name for name, linear in self.architecture.linears.items() if linear.bias}
        if self.architecture.head_bias:
            biased.add(self.architecture.head)
        linears = {*self.architecture.linears, self.architecture.head}
        ignored: Mapping[str, str] = self.quantization.ignored if self.quantization else {}
        unused: dict[str, list[str]] = {}
        for module, leaves in shards.modules.items():
            known = _DENSE
            if self.quantization is not None and self.quantization.owns(leaves):
                known = self.quantization.required | self.quantization.optional | {"bias"}
                for leaf in sorted(self.quantization.required.difference(leaves)):
                    raise CheckpointError(f"{self.folder} has no tensor {module}.{leaf}")
            if module in biased and "bias" not in leaves:
                family = self.architecture.family
                raise CheckpointError(
                    f"{self.folder} has no tensor {module}.bias, which {family} models have"
                )
            if module in linears and module not in biased and "bias" in leaves:
                self._require_zeros(shards, leaves["bias"])
            for leaf, name in leaves.items():
                if leaf in ignored:
                    unused.setdefault(ignored[leaf], []).append(name)
                elif leaf not in known and name not in self.architecture.tensors:
                    raise self._not_read(name, leaf)
        self._require_quantized(shards)
        if self.quantization is not None and self.quantization.in_16_bits:
            logger.warning(
                "%s: %s weights are dequantized to 16 bits: they take twice the memory of the "
                "files, or about a quarter of that with --quantize nf4",
                self.folder,
                self.format,
            )
        if self.quantization is not None and (remark := self.quantization.remark):
            logger.warning("%s: %s", self.folder, remark)
        if self.quantization is not None and (
            unknown := unknown_settings(self.quantization.settings)
        ):
            logger.warning(
                "%s: the quantization settings have %s, which is not known here: if it changes "
                "what the weights mean, the output is wrong",
                self.folder,
                ", ".join(unknown),
            )
        if self.quantization is not None and (rounding := self.quantization.rounding(shards)):
            logger.info("%s: %s", self.folder, rounding)
        if shards.other_parts:
            logger.warning(
                "%s: %d tensors such as %s are not used: texts are served, nothing else",
                self.folder,
                len(shards.other_parts),
                shards.other_parts[0],
            )
        for reason, names in unused.items():
            logger.warning(
                "%s: tensors such as %s (%d) are not used: %s",
                self.folder,
                names[0],
                len(names),
                reason,
            )

    def _require_modules(self, shards: Shards) -> None:
        """Raises CheckpointError for a module or a tensor that is not there."""
        about, family = self.architecture, self.architecture.family
        for module in about.weighted:
            if module not in shards.modules:
                raise CheckpointError(
                    f"{self.folder} has no tensor {module}.weight, which {family} models have"
                )
        for module in about.linears:
            if module not in shards.modules:
                raise CheckpointError(
                    f"{self.folder} has no tensor of {module}, which {family} models have"
                )
        for name in sorted(about.tensors):
            # A router may be quantized: it has other tensors then.
            if name not in shards and module_and_leaf(name)[0] not in shards.modules:
                raise CheckpointError(
                    f"{self.folder} has no tensor {name}, which {family} models have"
                )
        if not (about.tied or about.only) and about.head not in shards.modules:
            raise CheckpointError(
                f"{self.folder} has no tensor {about.head}.weight, and tie_word_embeddings of "
                "config.json does not say that the embedding is used in its place"
            )

    def _require_zeros(self, shards: Shards, name: str) -> None:
        """Refuse a bias that config.json does not speak of, unless it adds nothing.

        transformers would leave it out. Some GPTQ writers store zeros for every layer.
        """
        if shards.read(name).count_nonzero():
            raise CheckpointError(
                f"{self.folder} has a tensor {name} that is not zero, but by its config.json this "
                f"{self.architecture.family} model has no bias there: get the config.json that "
                "belongs to the weights, or remove the tensor"
            )

    def _require_quantized(self, shards: Shards) -> None:
        """Refuse a quantization that no tensor has, unless the config leaves out modules by name.

        The config is then another checkpoint's, or the files are.
        """
        format = self.quantization
        if self.architecture.only:
            return  # parts may be left in 16 bits
        if format is None or any(map(format.owns, shards.modules.values())):
            return
        left_out = {name for names in _LEFT_OUT for name in format.settings.get(names) or ()}
        if left_out <= {self.architecture.head}:
            raise CheckpointError(
                f"{self.folder}: config.json says that the weights are quantized (quant_method "
                f"{format.quant_method!r}), but no tensor is: remove quantization_config from it "
                "if the weights are meant to be 16-bit, or get the files it belongs to"
            )

    def _not_read(self, name: str, leaf: str) -> CheckpointError:
        owners = dict.fromkeys(f.quant_method for f in FORMATS if leaf in f.marks)
        hint = f"; it is a tensor of {' or '.join(owners)}" if owners else ""
        stated = (
            "config.json has no quantization_config"
            if self.quantization is None
            else f"the checkpoint's format is {self.format}"
        )
        return CheckpointError(
            f"{self.folder}: nothing here reads the tensor {name}: {stated}{hint}"
        )

    def projection(self, shards: Shards, module: str) -> PackedWeight | DenseWeight:
        """The linear layer ``module`` by itself, from this folder's ``shards``."""
        _, weight = self._read(shards, module)
        if isinstance(weight, Tensor):
            raise CheckpointError(f"{self.folder}: {module} is not a linear layer")
        return weight

    def weights(self) -> Iterator[tuple[str, Weight]]:
        return trimmed(self._weights())

    def _weights(self) -> Iterator[tuple[str, Weight]]:
        shards = open_shards(self.folder, self.architecture)
        self.check(shards)
        ignored: Mapping[str, str] = self.quantization.ignored if self.quantization else {}
        modules = {m: found for m, found in shards.modules.items() if found.keys() - ignored.keys()}
        done: set[str] = set()
        for module in modules:
            if module in done:
                continue
            fused, siblings = self.architecture.fused.get(module, ("", ()))
            if siblings and all(sibling in modules for sibling in siblings):
                done.update(siblings)
                yield from self._fuse(shards, fused, siblings)
                continue
            found = modules[module]
            plain = {leaf: n for leaf, n in found.items() if n in self.architecture.tensors}
            if self.quantization is not None and self.quantization.owns(found):
                plain.pop("weight", None)
            if found.keys() - plain.keys():
                name, weight = self._read(shards, module)
                yield name, weight
                if isinstance(weight, Tensor) and "bias" in found:  # of a LayerNorm
                    yield module + ".bias", shards.read(module + ".bias", tuple(weight.shape))
            for name in plain.values():
                yield name, shards.read(name)

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
        if self.quantization and self.quantization.owns(shards.modules[module]):
            if module == self.architecture.embedding:
                return module + ".weight", self.quantization.embedding(shards, module)
            read = self.quantization.read(shards, module)
            self._require_shape(module, (read.out_features, read.in_features))
            return module, read
        name = module + ".weight"
        weight = shards.read(name)
        if not weight.is_floating_point() or weight.dtype.itemsize == 1:
            raise CheckpointError(
                f"{self.folder}: {name} is {weight.dtype}, expected 16 or 32 bits; "
                f"the checkpoint's format is {self.format}"
            )
        if module not in self.architecture.linears and module != self.architecture.head:
            return name, weight
        self._require_shape(name, tuple(weight.shape))
        bias = module + ".bias"
        return module, DenseWeight(
            weight, shards.read(bias, (weight.shape[0],)) if bias in shards else None
        )

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """name: of a linear layer, or of its weight."""
        linear = self.architecture.linears.get(name.removesuffix(".weight"))
        # The head's rows may be more than config.json says, or an adapter's.
        expected = shape if linear is None else (linear.out, linear.inputs)
        if len(shape) != 2 or shape != expected:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {shape}"
                + ("" if linear is None else f", config.json says {expected}")
            )
