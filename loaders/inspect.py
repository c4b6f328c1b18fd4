"""What a checkpoint is made of: format, group size and bits of every weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.loaders.checkpoint import Checkpoint, Weight


@dataclass(frozen=True)
class WeightSummary:
    """One weight.

    kind: its number format.
    group_size: None if it has no groups.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    group_size: int | None
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """All bytes of the weight, scales and bias included, over its matrix elements."""
        elements = 1
        for size in self.shape:
            elements *= size
        return 8 * self.nbytes / elements


def inspect_checkpoint(checkpoint: Checkpoint) -> Iterator[WeightSummary]:
    """Summaries of all weights, in the checkpoint's order."""
    for name, weight in checkpoint.weights():
        yield _summary(name, weight)


def _summary(name: str, weight: Weight) -> WeightSummary:
    if isinstance(weight, PackedWeight):
        shape = (weight.out_features, weight.in_features)
        kind = _kind(weight)
        return WeightSummary(name, kind, shape, weight.group_size, weight.nbytes)
    if isinstance(weight, Tensor):
        kind = str(weight.dtype).removeprefix("torch.")
        return WeightSummary(name, kind, tuple(weight.shape), None, weight.nbytes)
    bias = 0 if weight.bias is None else weight.bias.nbytes
    kind = str(weight.weight.dtype).removeprefix("torch.")
    return WeightSummary(name, kind, tuple(weight.weight.shape), None, weight.weight.nbytes + bias)


def _kind(weight: PackedWeight) -> str:
    if weight.columns == 2 * weight.in_features:
        return "int8"
    act_order = "" if weight.perm is None else ", act-order"
    if (weight.levels.diff() == 1).all():
        return ("int4" if weight.zeros is None else "uint4 with zeros") + act_order
    return "4-bit codebook" + act_order
