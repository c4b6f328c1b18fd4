"""Experts as 16-bit checkpoints have them: one tensor holds those of all experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nybble.loaders.experts import mixtures, stacked_parts
from nybble.loaders.shards import Part, Shards, module_and_leaf
from nybble.models import Architecture

_DENSE = ("weight", "bias")


def parts_to_write(
    shards: Shards,
    architecture: Architecture,
    in_16_bits: Callable[[str], bool],
    *,
    dense: bool = False,
) -> dict[str, Part]:
    """The tensors that are to be written as parts of others, as the source stores them.

    in_16_bits: whether a linear layer, by name, is written in 16 bits. In a format it has tensors
        of its own.
    dense: all layers are written in 16 bits. Then experts are stacked also if the source has them
        one by one, in families of which transformers reads no others.
    """
    parts = {name: part for name, part in shards.parts.items() if part.index is None}
    stored = {part.source for part in shards.parts.values()}
    for prefix, mixture in mixtures(architecture):
        for stacked in sorted(mixture.stacked, key=lambda each: prefix + each.name not in stored):
            found = stacked_parts(prefix, stacked, len(mixture.experts))
            modules, leaves = zip(*map(module_and_leaf, found), strict=True)
            wanted = prefix + stacked.name in stored or (dense and mixture.always_stacked)
            if (
                wanted
                and parts.keys().isdisjoint(found)
                and leaves[0] in _DENSE
                and all(map(in_16_bits, modules))
            ):
                parts |= found
    return parts


class Stacker:
    """Puts parts of tensors together as they come."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        """parts: by the names under which they come."""
        self._parts = parts
        self._missing = Counter(part.source for part in parts.values())
        self._entries = {
            part.source: part.index + 1 for part in parts.values() if part.index is not None
        }
        self._stacks: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of ``tensors`` that are no parts, and the tensors that now have all of theirs."""
        whole = {}
        for name, tensor in tensors.items():
            part = self._parts.get(name)
            if part is None:
                whole[name] = tensor
                continue
            self._missing[part.source] -= 1
            if part.index is None:
                self._stacks[part.source] = tensor
            else:
                part.put(self._stack(part, tensor)[part.index], tensor)
            if not self._missing[part.source]:
                whole[part.source] = self._stacks.pop(part.source)
        return whole

    def _stack(self, part: Part, tensor: Tensor) -> Tensor:
        """The tensor that the part belongs to, in a dtype that holds all parts so far."""
        stack = self._stacks.get(part.source)
        if stack is None:
            shape = self._entries[part.source], *part.entry_shape(tuple(tensor.shape))
            stack = torch.empty(shape, dtype=tensor.dtype)
        self._stacks[part.source] = stack.to(torch.promote_types(stack.dtype, tensor.dtype))
        return self._stacks[part.source]
