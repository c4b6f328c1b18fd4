"""(IA)³ (Liu et al. 2022): vectors that multiply the outputs, or the inputs, of linear layers.

Per module ``ia3_l``: ``(out, 1)``, or ``(1, in)`` of one of the ``feedforward_modules``, whose
inputs it multiplies. The inputs of an MLP's last layer are ``activation(gate) · up``, so that to
multiply them is to multiply the outputs of ``up``. Of other layers no inputs can be multiplied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nybble.loaders.adapter_changes import LoRAModule
from nybble.loaders.errors import AdapterError
from nybble.models import Architecture, Mlp


def vector_changes(
    path: Path, vectors: Mapping[str, Tensor], feedforward: Collection[str], base: Architecture
) -> dict[str, LoRAModule]:
    """The changes of linear layers, by their names.

    vectors: by the name of the layer. feedforward: those that multiply inputs.
    Raises AdapterError naming a layer of which the inputs cannot be multiplied.
    """
    ups = dict(_ups(base))
    factors: dict[str, Tensor] = {}

    def multiply(module: str, by: Tensor) -> None:
        factors[module] = factors[module] * by if module in factors else by

    for module, vector in vectors.items():
        values = vector.flatten().float()
        if module not in feedforward:
            multiply(module, values)
        elif module in ups:
            up, before = ups[module]
            multiply(up, torch.cat((torch.ones(before), values)))
        else:
            raise AdapterError(
                f"{path}: feedforward_modules select {module}, whose inputs cannot be multiplied "
                "here; the last layer of a gated MLP can be one, merge others with peft"
            )
    linears = base.linears
    return {
        module: LoRAModule(
            torch.zeros(0, linears[module].inputs),
            torch.zeros(linears[module].out, 0),
            1.0,
            factors=each,
        )
        for module, each in factors.items()
    }


def _ups(base: Architecture) -> Iterator[tuple[str, tuple[str, int]]]:
    """The last layer of each gated MLP, with the layer that ``up`` belongs to.

    Each with how many outputs of that layer come before those of ``up``.
    """
    for index, layer in enumerate(base.layers):
        mlp = layer.mlp
        if isinstance(mlp, Mlp) and mlp.gated and mlp.clamp is None and mlp.xielu is None:
            down, up = mlp.down.linears[0], mlp.up.linears[-1]
            yield (
                base.module(index, down.name),
                (base.module(index, up.name), up.out - down.inputs),
            )
