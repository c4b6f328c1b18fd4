"""Several adapters as one, with weights, as PEFT's ``add_weighted_adapter`` combines them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Literal

import torch

from nybble.loaders.adapter_changes import LoRAAdapter, LoRAModule, MatrixChange
from nybble.loaders.errors import AdapterError

Combination = Literal["cat", "linear"]
_Join = Callable[[str, Sequence[tuple[LoRAModule, float]]], LoRAModule]


def combine_adapters(
    adapters: Sequence[LoRAAdapter], weights: Sequence[float], *, combination: Combination = "cat"
) -> LoRAAdapter:
    """Combine adapters into one in float32. A module may occur in only some of them.

    cat: exactly the weighted sum of the adapters' changes; ranks add up.
    linear: the weighted sums of the A and of the B matrices, each scaled by the square root of the
        weight (with the factor α/r). Their product also mixes one adapter's A with another's B.
        Ranks must be equal.
    Raises AdapterError if there is not one weight for each adapter, if ranks differ, or if an
    adapter is no sum: if it has DoRA, biases, norms, or matrices or rows of its own.
    """
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(
            f"{len(adapters)} adapters and {len(weights)} weights: give one for each"
        )
    for adapter in adapters:
        for name, module in adapter.modules.items():
            if module.magnitude is not None or module.changes_bias:
                kind = "biases" if module.magnitude is None else "DoRA"
                raise AdapterError(
                    f"an adapter has {kind} on {name}: only plain LoRA can be combined or "
                    "weighted; merge such adapters one after the other, each with weight 1"
                )
    join = _cat if combination == "cat" else _linear
    for adapter in adapters:
        if adapter.norms:
            raise AdapterError(
                "an adapter has norms of its own: only plain LoRA can be combined or weighted"
            )
        for end in (adapter.embedding, adapter.head):
            if end is not None and not end.is_low_rank:
                raise AdapterError(
                    "an adapter has rows or a matrix of its own for the embedding or the output "
                    "layer: only plain LoRA can be combined or weighted"
                )
    names = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
    modules = {}
    for name in names:
        factors = [
            (adapter.modules[name], weight * adapter.modules[name].scale)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.modules
        ]
        modules[name] = join(name, factors)
    embedding = _end([adapter.embedding for adapter in adapters], weights, "the embedding", join)
    head = _end([adapter.head for adapter in adapters], weights, "the output layer", join)
    digest = blake2b(repr((combination, list(weights))).encode(), digest_size=16)
    for adapter in adapters:
        digest.update(adapter.digest)
    return LoRAAdapter(modules, digest.digest(), embedding, head)


def _end(
    changes: Sequence[MatrixChange | None], weights: Sequence[float], name: str, join: _Join
) -> MatrixChange | None:
    """Combine what adapters change of the embedding, or of the output layer."""
    factors, bases = [], []
    for change, weight in zip(changes, weights, strict=True):
        if change is None:
            continue
        if change.low_rank is not None:
            factors.append((change.low_rank, weight * change.low_rank.scale))
        if change.base is not None:
            bases.append(change.base)
    if any(not torch.equal(bases[0], base) for base in bases):
        raise AdapterError(f"adapters were trained on different matrices of {name}")
    if not factors and not bases:
        return None
    base = bases[0] if bases else None
    return MatrixChange(base, low_rank=join(name, factors) if factors else None)


def _cat(_: str, factors: Sequence[tuple[LoRAModule, float]]) -> LoRAModule:
    a = torch.cat([module.a.float() * factor for module, factor in factors])
    return LoRAModule(a, torch.cat([module.b.float() for module, _ in factors], dim=1), 1.0)


def _linear(name: str, factors: Sequence[tuple[LoRAModule, float]]) -> LoRAModule:
    ranks = sorted({module.rank for module, _ in factors})
    if len(ranks) > 1:
        raise AdapterError(
            f"{name} has ranks {', '.join(map(str, ranks))}: linear combination needs equal ranks; "
            "concatenation does not"
        )
    a, b = torch.zeros_like(factors[0][0].a.float()), torch.zeros_like(factors[0][0].b.float())
    for module, factor in factors:
        root = math.sqrt(abs(factor))
        a += math.copysign(root, factor) * module.a.float()
        b += root * module.b.float()
    return LoRAModule(a, b, 1.0)
