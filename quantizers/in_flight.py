"""Quantizes a 16-bit checkpoint while it streams in, without writing a quantized one first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import PretrainedConfig

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.packed import round_to_int8
from nybble.loaders import Checkpoint, CheckpointError
from nybble.loaders.checkpoint import Weight, can_be_rounded
from nybble.models import architecture_of
from nybble.quantizers.codebook import quantize_codebook

InFlightFormat = Literal["nf4"]  # what `--quantize` offers
HeadFormat = Literal["auto", "int8", "16bit"]  # and `--head`

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head"
_HEAD_GROUP_SIZE = 128


def head_format(
    source: Checkpoint, layers: InFlightFormat | None, head: HeadFormat
) -> Literal["int8"] | None:
    """How the output layer of ``source`` is kept; None for as it is.

    auto: in 8 bits beside layers in fewer than 16, if its inputs can be divided into groups. A
    model in 16 bits stays as it is, and so does what is packed already.
    """
    if head == "auto" and source.format != "packed":
        rounded = layers is not None or not can_be_rounded(source)
        fits = architecture_of(source.config).hidden % _HEAD_GROUP_SIZE == 0
        return "int8" if rounded and fits else None
    return "int8" if head == "int8" else None


@dataclass(frozen=True)
class InFlight:
    """A checkpoint whose 16-bit weights are rounded as they are read; quantized ones pass through.

    layers: ``nf4`` rounds the decoder's linear layers as bitsandbytes does (blocks of 64).
    head: ``int8`` keeps the output layer in 8 bits (a scale for every 128 inputs). If the model
        ties it to the embeddings, the two are stored separately and the embeddings keep 16 bits.
    """

    source: Checkpoint
    layers: InFlightFormat | None = None
    head: Literal["int8"] | None = None

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def config(self) -> PretrainedConfig:
        return self.source.config

    @property
    def format(self) -> str:
        return self.layers or self.source.format

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Raises CheckpointError if ``layers`` is given and the source is quantized already."""
        if self.layers and not can_be_rounded(self.source):
            raise CheckpointError(
                f"{self.folder} is quantized already ({self.source.format}); only 16-bit "
                f"checkpoints can be quantized to {self.layers}"
            )
        embedding: Tensor | None = None
        has_head = False
        for name, weight in self.source.weights():
            has_head |= name == _HEAD
            if isinstance(weight, DenseWeight) and name == _HEAD:
                yield name, self._head(weight)
            elif isinstance(weight, DenseWeight) and self.layers:
                rounded = quantize_codebook(weight.weight, self.layers)
                yield name, replace(rounded, bias=weight.bias).packed()
            else:
                yield name, weight
            if name == _EMBEDDING and isinstance(weight, Tensor):
                embedding = weight
        if self.head and not has_head and embedding is not None:
            yield _HEAD, self._head(DenseWeight(embedding))

    def _head(self, weight: DenseWeight) -> PackedWeight | DenseWeight:
        return _int8(weight, self.folder) if self.head == "int8" else weight


def _int8(weight: DenseWeight, folder: Path) -> PackedWeight:
    columns = weight.in_features
    if columns % _HEAD_GROUP_SIZE:
        raise CheckpointError(
            f"{folder}: {_HEAD} has {columns} inputs, not a multiple of {_HEAD_GROUP_SIZE}: "
            "it cannot be kept in 8 bits"
        )
    return replace(round_to_int8(weight.weight, _HEAD_GROUP_SIZE), bias=weight.bias)
