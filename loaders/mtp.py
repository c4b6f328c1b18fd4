"""The MTP head that a checkpoint holds beside its model, as a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders.checkpoint import Checkpoint, FolderCheckpoint, Weight
from nybble.loaders.errors import CheckpointError
from nybble.loaders.experts import open_shards
from nybble.loaders.footprint import weight_bytes
from nybble.loaders.formats import format_of
from nybble.loaders.shards import Shards
from nybble.models import Architecture, Mtp, UnsupportedModelError


@dataclass(frozen=True)
class MtpCheckpoint:
    """A head's weights, under the names that :class:`nybble.models.Mtp` has for them.

    source: reads them. ``join`` is a tensor under ``<join>.weight`` if it is not quantized.
    about: the head. architecture: what it goes on with after ``join``.
    """

    source: Checkpoint
    about: Mtp
    architecture: Architecture

    @property
    def folder(self) -> Path:
        """The model's."""
        return self.source.folder

    @property
    def config(self) -> PretrainedConfig:
        """The model's."""
        return self.source.config

    @property
    def format(self) -> str:
        return self.source.format

    def weights(self) -> Iterator[tuple[str, Weight]]:
        return self.source.weights()

    def output_layer(self) -> PackedWeight | DenseWeight | None:
        """The model's own, whole, as it is stored; None if it is tied to the embeddings."""
        whole = FolderCheckpoint(self.folder, self.config, format_of(self.folder))
        name, shards = self.architecture.head, Shards(self.folder, whole.architecture)
        return whole.projection(shards, name) if name in shards.modules else None

    def output_layer_bytes(self, dtype: torch.dtype) -> int:
        """Of :meth:`output_layer`, once it is loaded in ``dtype``."""
        alone = replace(self.architecture, layers=(), only=(self.architecture.head + ".",))
        return weight_bytes(self.folder, dtype, part=alone)


def has_mtp(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint as it is stored holds an MTP head that :func:`open_mtp` would open."""
    if not isinstance(checkpoint, FolderCheckpoint) or checkpoint.architecture.mtp is None:
        return False
    return any(_own(checkpoint, checkpoint.architecture.mtp))


def open_mtp(checkpoint: Checkpoint) -> MtpCheckpoint:
    """The MTP head of a checkpoint as it is stored.

    Raises UnsupportedModelError for a family that has none, and CheckpointError if the folder lacks
    it or a part of it.
    """
    folder = checkpoint.folder
    if not isinstance(checkpoint, FolderCheckpoint):
        raise CheckpointError(
            f"{folder} is packed already, without its MTP head: give the model it was packed from"
        )
    whole = checkpoint.architecture
    about, architecture = whole.mtp, whole.mtp_head
    if about is None or architecture is None:
        raise UnsupportedModelError(
            f"{whole.family} models have no MTP head"
            + (
                ": num_nextn_predict_layers is 0 in config.json"
                if getattr(checkpoint.config, "num_nextn_predict_layers", None) == 0
                else ""
            )
        )
    if not has_mtp(checkpoint):
        raise CheckpointError(
            f"{folder} has no MTP head: no tensor's name begins with {about.prefixes[0]} (copies "
            "of a model in other formats often leave it out)"
        )
    shards = open_shards(folder, architecture)
    for module in (about.embedding_norm, about.hidden_norm, about.norm, about.join):
        if module not in shards.modules:
            raise CheckpointError(f"{folder} has no tensor {module}.weight, which MTP heads have")
    format = checkpoint.quantization
    if format is not None and not any(map(format.owns, shards.modules.values())):
        format = None  # the head was left in 16 bits
    source = FolderCheckpoint(folder, checkpoint.config, format, architecture)
    return MtpCheckpoint(source, about, architecture)


def mtp_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint's MTP head as they are stored, without copies of the model's.

    None if it has no such head. Raises CheckpointError for one which the index names and no file
    has.
    """
    if isinstance(checkpoint, FolderCheckpoint) and checkpoint.architecture.mtp is not None:
        shards = Shards(checkpoint.folder, checkpoint.architecture.mtp_head)
        for name in _own(checkpoint, checkpoint.architecture.mtp):
            yield name, shards.read(name)


def draft_bytes(
    draft: Checkpoint,
    dtype: torch.dtype,
    *,
    layers: Literal["4bit"] | None = None,
    head: Literal["int8"] | None = None,
) -> int:
    """:func:`nybble.loaders.footprint.weight_bytes` of a draft model or a head of either kind."""
    part = draft.architecture if isinstance(draft, MtpCheckpoint) else None
    return weight_bytes(draft.folder, dtype, layers=layers, head=head, part=part)


def _own(checkpoint: FolderCheckpoint, about: Mtp) -> Iterator[str]:
    """The names of the head's tensors, without those of copies."""
    for name in Shards(checkpoint.folder).names():
        if name.startswith(about.prefixes) and not name.startswith(about.copies):
            yield name
