"""Adapters on the stacked experts of a mixture: PEFT's ``target_parameters``.

Per parameter ``(experts, …)`` of a module ``…experts``: ``lora_A.weight`` ``(experts · rank, in)``,
expert by expert, and ``lora_B.weight`` ``(out, rank · experts)``, in which the expert varies
fastest. If several parameters of the module are adapted, all but one have ``base_layer.`` before
``lora_A``, so their shapes tell which is which (``peft.tuners.lora.layer.ParamWrapper``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nybble.loaders.adapter_config import AdapterSettings
from nybble.loaders.errors import AdapterError
from nybble.models import Architecture, Mixture, Stacked

# What is in front of "layers" depends on the model that was trained.
_KEY = re.compile(
    r"(?:.*\.)?(?P<module>layers\.[0-9]+\..+\.experts)(?P<nested>(?:\.base_layer)*)"
    r"\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight"
)


@dataclass(frozen=True)
class ExpertChange:
    """The change of one expert's linear layer.

    module: its absolute name.
    a: ``(rank, in)``; b: ``(out, rank)``.
    parameter: the name of the stacked parameter, by which settings are looked up.
    """

    module: str
    a: Tensor
    b: Tensor
    parameter: str


@dataclass(frozen=True)
class _Parameter:
    """A stacked parameter that the adapter's settings select.

    inputs, outputs: of one expert.
    """

    name: str
    prefix: str
    about: Stacked
    experts: int
    inputs: int
    outputs: int

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.experts * rank, self.inputs), (self.outputs, rank * self.experts)


def is_of_stacked_experts(key: str) -> bool:
    """Whether an adapter's tensor of this name belongs to stacked experts."""
    return _KEY.fullmatch(key) is not None


def expert_changes(
    path: Path, settings: AdapterSettings, tensors: Mapping[str, Tensor], base: Architecture
) -> Iterator[ExpertChange]:
    """The changes of all experts.

    tensors: those of which :func:`is_of_stacked_experts` is true.

    Raises AdapterError naming a parameter that has no tensors, or a tensor of another shape.
    """
    selected = _selected(path, settings, base)
    found: dict[str, dict[str, dict[str, tuple[str, Tensor]]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        assert match is not None, key
        of_parameter = found.setdefault(match["module"], {}).setdefault(match["nested"], {})
        of_parameter[match["side"]] = (key, tensor)
    for module in found:
        if module not in selected:
            raise AdapterError(
                f"{path} has tensors for {module}, whose parameters are not among its "
                "target_parameters or not in the base model"
            )
    for module, parameters in selected.items():
        pairs = list(found.get(module, {}).values())
        for parameter in parameters:
            rank = settings.rank(parameter.name)
            shapes = parameter.shapes(rank)
            fitting = [
                pair
                for pair in pairs
                if {"A", "B"} == pair.keys() and (pair["A"][1].shape, pair["B"][1].shape) == shapes
            ]
            if len(fitting) != 1:
                shown = ", ".join(
                    f"{key} {tuple(tensor.shape)}"
                    for pair in pairs
                    for key, tensor in pair.values()
                )
                raise AdapterError(
                    f"{path}: {parameter.name} needs lora_A {shapes[0]} and lora_B {shapes[1]} for "
                    f"{parameter.experts} experts and rank {rank}; there are {shown or 'none'}"
                )
            yield from _changes(parameter, fitting[0]["A"][1], fitting[0]["B"][1], rank)


def _selected(
    path: Path, settings: AdapterSettings, base: Architecture
) -> dict[str, list[_Parameter]]:
    """The selected parameters by the module that holds them, named from ``layers`` on."""
    selected: dict[str, list[_Parameter]] = {}
    used = set()
    for index, layer in enumerate(base.layers):
        if not isinstance(layer.mlp, Mixture):
            continue
        prefix = base.module(index, "")
        for stacked in layer.mlp.stacked:
            name = prefix + stacked.name
            targets = settings.targeting(name)
            if not targets or not stacked.holds[0].endswith(".weight"):
                continue
            used |= targets
            linears = [
                base.linears[f"{prefix}{n.format(0)}".removesuffix(".weight")]
                for n in stacked.holds
            ]
            parameter = _Parameter(
                name,
                prefix,
                stacked,
                len(layer.mlp.experts),
                linears[0].inputs,
                sum(linear.out for linear in linears),
            )
            module = name.rpartition(".")[0]
            selected.setdefault(module[module.index("layers.") :], []).append(parameter)
    for linear in base.dense_linears:
        used |= settings.targeting(f"{linear}.weight")
    for target in settings.target_parameters:
        if target not in used:
            raise AdapterError(
                f"{path}: target_parameters has {target!r}, which names neither stacked experts "
                "nor a linear layer of the base model; adapters on other parameters are not "
                "supported"
            )
    return selected


def _changes(parameter: _Parameter, a: Tensor, b: Tensor, rank: int) -> Iterator[ExpertChange]:
    of_experts_a = a.view(parameter.experts, rank, -1)
    of_experts_b = b.view(parameter.outputs, rank, parameter.experts).permute(2, 0, 1)
    shares = len(parameter.about.holds)
    for share, name in enumerate(parameter.about.holds):
        for expert in range(parameter.experts):
            whole = of_experts_b[expert]
            rows = (
                whole[share::shares] if parameter.about.interleaved else whole.chunk(shares)[share]
            )
            module = f"{parameter.prefix}{name.format(expert)}".removesuffix(".weight")
            yield ExpertChange(module, of_experts_a[expert], rows, parameter.name)
