"""The tensors of an EAGLE-3 head's checkpoint: :class:`nybble.models.eagle3.Eagle3Head`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nybble.loaders.errors import CheckpointError
from nybble.loaders.shards import Shards
from nybble.models.eagle3 import Eagle3Head


def read_eagle3(folder: Path, head: Eagle3Head, captured: int) -> Mapping[str, Tensor]:
    """The tensors of ``head`` by the names that it has for them, as they are stored.

    captured: the layers whose hidden states it reads.

    Raises CheckpointError for a tensor that is missing, unknown or of another shape.
    """
    shards, found = Shards(folder), {}
    needed, optional = head.tensors(captured), head.optional_tensors
    for stored in shards.names():
        name = _name(stored)
        shape = needed.get(name) or optional.get(name)
        if shape is None:
            raise CheckpointError(
                f"{folder} has a tensor {stored}, which EAGLE-3 heads do not have"
            )
        found[name] = shards.read(stored, shape)
    for name in needed:
        if name not in found:
            raise CheckpointError(f"{folder} has no tensor {name}, which EAGLE-3 heads have")
    if head.vocab != head.target_vocab:
        for name in ("d2t", "lm_head.weight"):
            if name not in found:
                raise CheckpointError(
                    f"{folder} has no tensor {name}, which an EAGLE-3 head has that drafts "
                    f"{head.vocab} of {head.target_vocab} tokens"
                )
    return found


def _name(stored: str) -> str:
    """Some checkpoints have the layer's number in a model, as of any other model."""
    name = stored.removeprefix("model.")
    layer = "layers.0."
    return "midlayer." + name.removeprefix(layer) if name.startswith(layer) else name
