"""A checkpoint's weights by name, placed on the device as they arrive, and taken part by part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.engine.parallel import mlps
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.matmul import gated_layout, preferred_layout
from nybble.kernels.packed import Weight
from nybble.loaders.errors import CheckpointError
from nybble.models import Architecture, Linear, LinearGroup, Mixture


class WeightStore:
    """Consumes weights one at a time; each goes to the device in its back end's layout.

    What is taken is checked against the architecture's sizes. Raises CheckpointError naming a
    weight that is missing, has another shape, or was not used.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, PackedWeight | DenseWeight | Tensor]],
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> None:
        """folder: of the checkpoint, which errors name."""
        self._folder = folder
        layout = preferred_layout(device)
        gated = {
            architecture.module(index, mlp.up.name)
            for index, layer in enumerate(architecture.layers)
            for mlp in mlps(layer.mlp)
            if mlp.gated
        }
        self._weights: dict[str, PackedWeight | DenseWeight | Tensor] = {}
        # On the CPU weights stay where they are, in the mapping of their file.
        places = expert_places(architecture) if device.type != "cpu" else {}
        shared: dict[str, dict[str, Tensor]] = {}
        for name, weight in weights:
            if isinstance(weight, PackedWeight):
                to = gated_layout(weight, device) if name in gated else layout
                placed: Weight = weight.to(device).to_layout(to)
            elif isinstance(weight, DenseWeight):
                bias = None if weight.bias is None else weight.bias.to(device, dtype)
                placed = replace(weight, weight=weight.weight.to(device, dtype), bias=bias)
            if not isinstance(weight, Tensor):
                if name in places:
                    first, number, count = places[name]
                    placed = _among(placed, shared.setdefault(first, {}), number, count)
                self._weights[name] = placed
            else:
                # Routers decide: rounded differently they would choose other experts.
                wide = torch.float32 if name in architecture.tensors else dtype
                self._weights[name] = weight.to(device, wide)

    def error(self, reason: str) -> CheckpointError:
        """The error that the checkpoint is not what the architecture says."""
        return CheckpointError(reason if self._folder is None else f"{self._folder}: {reason}")

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The tensor ``name``, which must have this shape."""
        weight = self._weights.pop(name, None)
        if weight is None:
            raise self.error(f"there is no {name}")
        if not isinstance(weight, Tensor):
            raise self.error(f"{name} is a linear layer's weight, expected a plain tensor")
        self._require_shape(name, tuple(weight.shape), shape)
        return weight

    def optional_tensor(self, name: str, columns: int) -> Tensor | None:
        """The tensor ``name``, ``(any number, columns)``; None if the checkpoint has none."""
        found = self._weights.get(name)
        if not isinstance(found, Tensor):
            return None
        return self.tensor(name, found.shape[0], columns)

    def vector(self, name: str, size: int) -> Tensor:
        """The tensor ``name`` of so many numbers, ``(size,)``; it may have dimensions of 1."""
        found = self._weights.get(name)
        if isinstance(found, Tensor) and found.numel() == size:
            self._weights[name] = found.flatten()
        return self.tensor(name, size)

    def router(self, module: str, out: int, inputs: int) -> Tensor:
        """The float32 weight ``(out, inputs)`` of a router, also if it was quantized."""
        weight = self._weights.get(module)
        if isinstance(weight, PackedWeight):
            self.optional_linear(module, out, inputs)
            return weight.dequantize()
        return self.tensor(module + ".weight", out, inputs)

    def optional_linear(self, name: str, out: int, inputs: int) -> Weight | None:
        """The linear layer ``name``; None if the checkpoint has none."""
        weight = self._weights.pop(name, None)
        if weight is None:
            return None
        if isinstance(weight, Tensor):
            raise self.error(f"{name} is a plain tensor, expected a linear layer's weight")
        self._require_shape(name, (weight.out_features, weight.in_features), (out, inputs))
        return weight

    def group(self, module: str, group: LinearGroup) -> tuple[Weight, ...]:
        """The group's weights: one if they could be joined, else one for each linear layer.

        module: what the names of the group are relative to, with a dot at its end.
        """
        whole = self.optional_linear(module + group.name, group.out, group.inputs)
        if whole is not None:
            needs_bias = any(linear.bias for linear in group.linears)
            self._require_bias(module + group.linears[0].name, whole, needs_bias)
            return (whole,)
        return tuple(self._linear(module, linear) for linear in group.linears)

    def experts(self, module: str, groups: Sequence[LinearGroup]) -> list[tuple[Weight, ...]]:
        """The same group of every expert; for each of its weights (:meth:`group`), all experts'."""
        found = [self.group(module, group) for group in groups]
        if len({len(weights) for weights in found}) > 1:
            found = [_separate(*each) for each in zip(found, groups, strict=True)]
        return list(zip(*found, strict=True))

    def _linear(self, module: str, linear: Linear) -> Weight:
        weight = self.optional_linear(module + linear.name, linear.out, linear.inputs)
        if weight is None:
            raise self.error(f"there is no {module}{linear.name}")
        self._require_bias(module + linear.name, weight, linear.bias)
        return weight

    def finish(self) -> None:
        """Refuse weights that no part used: ignoring them would change the model."""
        if self._weights:
            names = sorted(self._weights)
            raise self.error(
                f"there are {len(names)} weights this architecture does not use, the first is "
                f"{names[0]}"
            )

    def _require_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        # The kernels go by config.json's sizes and would read beyond what is there.
        if found != expected:
            raise self.error(f"{name} has shape {found}, config.json says {expected}")

    def _require_bias(self, name: str, weight: Weight, needed: bool) -> None:
        # One that is not needed is computed: some GPTQ writers store zeros for every layer.
        if needed and weight.bias is None:
            raise self.error(f"there is no {name}.bias, which this architecture has")


def expert_places(architecture: Architecture) -> dict[str, tuple[str, int, int]]:
    """Where an expert's weight, by its name, is among those of all experts.

    The name of the first expert's, its own number, and how many there are.
    """
    places = {}
    for index, layer in enumerate(architecture.layers):
        if not isinstance(layer.mlp, Mixture):
            continue
        names = [
            [name for group in e.groups for name in (group.name, *(x.name for x in group.linears))]
            for e in layer.mlp.experts
        ]
        for number, own in enumerate(names):
            for first, name in zip(names[0], own, strict=True):
                place = architecture.module(index, first), number, len(names)
                places[architecture.module(index, name)] = place
    return places


def _among(weight: Weight, shared: dict[str, Tensor], number: int, count: int) -> Weight:
    """The same weight in the memory that it shares with those of the other experts.

    Kernels read all experts as one tensor. Put together once all are there, a layer's would for a
    while be on the device twice.

    shared: by field, all experts' tensors ``(experts, …)``, made with the first expert's.
    """
    own = {each.name: getattr(weight, each.name) for each in fields(weight)}
    moved: dict[str, Any] = {}
    for field, tensor in own.items():
        if not isinstance(tensor, Tensor) or field == "levels":
            continue
        if field not in shared:
            shared[field] = tensor.new_empty((count, *tensor.shape))
        whole = shared[field]
        if tensor.dtype == whole.dtype and tensor.shape == whole.shape[1:]:
            moved[field] = whole[number].copy_(tensor)
    return replace(weight, **moved)


def _separate(weights: tuple[Weight, ...], group: LinearGroup) -> tuple[Weight, ...]:
    """One weight for each linear layer of the group, cut out of the one that holds all."""
    if len(weights) == len(group.linears):
        return weights
    (whole,) = weights
    parts, start = [], 0
    for linear in group.linears:
        stop = start + linear.out
        parts.append(_cut(whole, start, stop))
        start = stop
    return tuple(parts)


def _cut(weight: Weight, start: int, stop: int) -> Weight:
    if isinstance(weight, PackedWeight):
        return weight.to_layout("rows").rows(start, stop).to_layout(weight.layout)
    bias = None if weight.bias is None else weight.bias[start:stop]
    return replace(weight, weight=weight.weight[start:stop], bias=bias)
