"""A checkpoint's experts under one kind of names, whether it stacks their tensors or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nybble.loaders.errors import CheckpointError
from nybble.loaders.shards import Part, Shards
from nybble.models import Architecture, Mixture, Stacked


def open_shards(folder: Path, architecture: Architecture) -> Shards:
    """The tensors of ``folder`` under the names that the architecture has.

    Tensors which hold all experts are shown as one for each expert and linear layer. Those that the
    architecture does not use are left out.

    Raises CheckpointError if files are missing or broken, if an expert's tensor is there twice or
    not at all, and if there is another number of experts than config.json says.
    """
    shards = Shards(folder, architecture)
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, Part] = {}
    for prefix, mixture in mixtures(architecture):
        for alias, name in mixture.router.aliases.items():
            if prefix + alias in shards:
                parts[prefix + name] = Part(prefix + alias)
        for stacked in mixture.stacked:
            if prefix + stacked.name in shards:
                shapes = shapes or {header.name: header.shape for header in shards.headers()}
                shape = shapes[prefix + stacked.name]
                parts |= _separated(folder, prefix, stacked, len(mixture.experts), shape)
    shards.present(parts)
    _check_experts(shards, architecture)
    return shards


def mixtures(architecture: Architecture) -> Iterator[tuple[str, Mixture]]:
    """The prefix of every layer with a mixture, and the mixture."""
    for index, layer in enumerate(architecture.layers):
        if isinstance(layer.mlp, Mixture):
            yield architecture.module(index, ""), layer.mlp


def _separated(
    folder: Path, prefix: str, stacked: Stacked, experts: int, shape: tuple[int, ...]
) -> dict[str, Part]:
    source, shares = prefix + stacked.name, len(stacked.holds)
    if shape[0] != experts:
        raise CheckpointError(
            f"{folder}: {source} holds {shape[0]} experts, but config.json says {experts}"
        )
    rows = Part(source, 0, transposed=stacked.transposed).shape(shape)[0]
    if rows % shares:
        raise CheckpointError(
            f"{folder}: {source} has shape {shape}: its rows are not those of {shares} "
            "linear layers of one size"
        )
    return stacked_parts(prefix, stacked, experts)


def stacked_parts(prefix: str, stacked: Stacked, experts: int) -> dict[str, Part]:
    """The parts of a tensor that holds those of all experts, by their own names."""
    source, shares = prefix + stacked.name, len(stacked.holds)
    return {
        prefix + name.format(expert): Part(
            source, expert, share, shares, stacked.interleaved, stacked.transposed
        )
        for share, name in enumerate(stacked.holds)
        for expert in range(experts)
    }


def _check_experts(shards: Shards, architecture: Architecture) -> None:
    """Raises CheckpointError naming an expert's linear layer that is missing or too many."""
    for prefix, mixture in mixtures(architecture):
        expected = {
            prefix + linear.name for group in mixture.expert_groups for linear in group.linears
        }
        # What all names of experts begin with: "model.layers.0.mlp.experts."
        first = prefix + mixture.expert_groups[0].linears[0].name
        around = first[: first.index(".experts.") + len(".experts.")]
        found = {module for module in shards.modules if module.startswith(around)}
        count = len(mixture.experts)
        for module in sorted(found - expected):
            raise CheckpointError(
                f"{shards.folder} has {module}, but config.json says {count} experts, numbered "
                f"0 to {count - 1}"
            )
        for module in sorted(expected - found):
            raise CheckpointError(
                f"{shards.folder} has no tensor of {module}: config.json says {count} experts"
            )
