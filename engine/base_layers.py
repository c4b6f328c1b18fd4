"""What an adapter needs to know of the base: its weights, norms of their rows, and biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.engine.parts import NormPart
from nybble.engine.weight_store import WeightStore
from nybble.kernels import PackedWeight
from nybble.kernels.backend import Backend
from nybble.kernels.packed import Weight
from nybble.loaders import Checkpoint
from nybble.loaders.adapter import LoRAModule
from nybble.models import Architecture

# Rows dequantized at a time: 16 MiB of float32 at 4096 columns.
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class BaseModel:
    """The weights of a decoder.

    projections: of each projection that every token passes, one for all its layers or one for each.
    embedding: ``(vocab, hidden)``. head: of the output layer.
    norm_tensors: weights and biases of norms as stored, by the names of their modules.
    norm: the norm of a module with another weight and bias.
    """

    projections: Sequence[tuple[Weight, ...]]
    embedding: Tensor
    head: Weight
    norm_tensors: Mapping[str, tuple[Tensor, Tensor | None]]
    norm: Callable[[str, Tensor, Tensor | None], NormPart]
    backend: Backend


def whole_projections(
    checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype
) -> list[tuple[Weight, ...]]:
    """:attr:`BaseModel.projections` of all ranks together, on the CPU.

    They stay where the checkpoint's files are mapped, if it is packed.
    """
    groups = [
        (architecture.module(index, ""), group)
        for index, layer in enumerate(architecture.layers)
        for group in layer.groups
    ]
    names = {
        module + name
        for module, group in groups
        for name in (group.name, *(linear.name for linear in group.linears))
    }
    weights = (each for each in checkpoint.weights() if each[0] in names)
    store = WeightStore(weights, architecture, torch.device("cpu"), dtype)
    return [store.group(module, group) for module, group in groups]


@dataclass(frozen=True)
class BaseLayers:
    """The layers of one projection.

    weights: one that holds all layers' rows, or one for each layer.
    offsets: where each layer's outputs begin, then the number of outputs.
    """

    weights: tuple[Weight, ...]
    offsets: tuple[int, ...]

    def gains_and_shifts(self, layer: int, module: LoRAModule) -> Tensor:
        """What an adapter does to a layer's outputs beside its low-rank part.

        Float32 ``(2, out)``; see :mod:`nybble.engine.adapter_slots` for the formula.
        """
        out = self.offsets[layer + 1] - self.offsets[layer]
        bias, changed = self._bias(layer), module.bias(self._bias(layer))
        gains = torch.zeros(out)
        if module.factors is not None:
            gains = module.factors.float() - 1
        elif module.magnitude is not None:
            for start, rows in self._rows(layer):
                stretch = module.stretch(rows, start)
                assert stretch is not None
                gains[start : start + len(rows)] = stretch - 1
        shifts = torch.zeros(out) if changed is None else changed.clone()
        if bias is not None:
            shifts -= (1 + gains) * bias
        return torch.stack((gains, shifts))

    def _rows(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """The layer's weight in float32, some rows at a time, each time with the first one."""
        weight, first, last = self._place(layer)
        if isinstance(weight, PackedWeight):
            weight = weight.to_layout("rows")
        for start in range(first, last, _ROWS_AT_A_TIME):
            stop = min(start + _ROWS_AT_A_TIME, last)
            if isinstance(weight, PackedWeight):
                yield start - first, weight.rows(start, stop).dequantize()
            else:
                yield start - first, weight.weight[start:stop].float()

    def _bias(self, layer: int) -> Tensor | None:
        weight, start, stop = self._place(layer)
        return None if weight.bias is None else weight.bias[start:stop].float()

    def _place(self, layer: int) -> tuple[Weight, int, int]:
        """The weight that holds the layer, with the first and the last of its rows in it."""
        start, stop = self.offsets[layer], self.offsets[layer + 1]
        if len(self.weights) == 1:
            return self.weights[0], start, stop
        return self.weights[layer], 0, stop - start
