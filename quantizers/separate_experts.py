"""transformers' mixtures of experts with a linear layer for each expert's weights.

transformers stacks them in parameters of three dimensions. Quantizing, training and packed weights
need linear layers, whose names here are those of checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nybble.kernels.reference import activate, clamped_swiglu, gated
from nybble.models import Architecture, LinearGroup, Mixture, Mlp

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Expert(nn.Module):
    """One expert's MLP.

    rows: which rows of the mixture's input the expert is computing, int64.
    """

    def __init__(self, about: Mlp) -> None:
        super().__init__()
        self._about = about
        self.rows: Tensor | None = None
        for group in about.groups:
            for linear in group.linears:
                layer = nn.Linear(linear.inputs, linear.out, bias=linear.bias)
                self.add_module(linear.leaf, layer)

    def forward(self, x: Tensor) -> Tensor:
        about, up = self._about, self._outputs(self._about.up, x)
        if about.clamp is not None:
            hidden = clamped_swiglu(up, about.clamp.alpha, about.clamp.limit)
        elif about.gated:
            hidden = gated(up, about.activation)
        else:
            hidden = activate(up, about.activation)
        return self._outputs(about.down, hidden)

    def _outputs(self, group: LinearGroup, x: Tensor) -> Tensor:
        parts: list[Tensor] = [self.get_submodule(linear.leaf)(x) for linear in group.linears]
        return torch.cat(parts, dim=-1)


class SeparateExperts(nn.ModuleList):
    """Stands in for a family's module of stacked experts."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__(Expert(expert) for expert in mixture.experts)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sums of the chosen experts' outputs.

        x: ``(rows, hidden)``; top_k_index, top_k_weights: ``(rows, top_k)``.
        """
        total = torch.zeros_like(x)
        for number, expert in enumerate(self):
            rows, place = torch.where(top_k_index == number)
            if len(rows):
                expert.rows = rows
                out = expert(x[rows]) * top_k_weights[rows, place, None]
                total.index_add_(0, rows, out.to(total.dtype))
        return total


def separate_experts(model: PreTrainedModel, architecture: Architecture) -> None:
    """Replace the mixtures' experts in ``model``; modules get the architecture's names.

    Weights of experts are not kept.
    """
    for index, layer in enumerate(architecture.layers):
        if not isinstance(layer.mlp, Mixture):
            continue
        owner = model.get_submodule(architecture.module(index, "").rstrip("."))
        (name,) = [name for name, child in owner.named_children() if hasattr(child, "experts")]
        owner.get_submodule(name).experts = SeparateExperts(layer.mlp)
        router = layer.mlp.router
        _move(owner, name, router.module.partition(".")[0])
        for alias, tensor in router.aliases.items():
            _move(owner, alias.rpartition(".")[0], tensor.rpartition(".")[0])


def _move(owner: nn.Module, path: str, wanted: str) -> None:
    """Give a submodule the path ``wanted``; code still finds it under ``path``.

    Does nothing if there is none at ``path``, or if it has the wanted path already.
    """
    before, after = path.rpartition("."), wanted.rpartition(".")
    try:
        module, holder = owner.get_submodule(path), owner.get_submodule(before[0])
        target = owner.get_submodule(after[0])
    except AttributeError:
        return
    if getattr(target, after[2], None) is module:
        return
    delattr(holder, before[2])
    holder.__dict__[before[2]] = module  # not registered, so that its parameters have one name
    target.add_module(after[2], module)
