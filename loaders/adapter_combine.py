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
    adapter is no sum: if it has DoRA, (IA)³, biases, norms, or matrices or rows of its own.
    """
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(
            f"{len(adapters)} adapters and {len(weights)} weights: give one for each"
        )
    for adapter in adapters:
        if (reason := not_a_sum(adapter)) is not None:
            raise AdapterError(f"an adapter {reason}: only plain LoRA can be combined or weighted")
    join = _cat if combination == "cat" else _linear
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
    digest = combined_digest([adapter.digest for adapter in adapters], weights, combination)
    return LoRAAdapter(modules, digest, embedding, head)


def combined_digest(
    digests: Sequence[bytes], weights: Sequence[float], combination: Combination = "cat"
) -> bytes:
    """The digest of what :func:`combine_adapters` makes of adapters with these digests."""
    digest = blake2b(repr((combination, list(weights))).encode(), digest_size=16)
    for each in digests:
        digest.update(each)
    return digest.digest()


def kind_of(module: LoRAModule) -> str:
    """What a module that is no plain LoRA has."""
    if module.factors is not None:
        return "(IA)³"
    return "biases" if module.magnitude is None else "DoRA"


def not_a_sum(adapter: LoRAAdapter) -> str | None:
    """Why an adapter cannot be weighted and added to others; None if it can."""
    for name, module in adapter.modules.items():
        if not module.is_low_rank:
            return f"has {kind_of(module)} on {name}"
    if adapter.invocation:
        return "is an aLoRA, which is active in a part of the text"
    if adapter.norms:
        return "has norms of its own"
    if adapter.vocab is not None:
        return "has a vocabulary of another size"
    for end in (adapter.embedding, adapter.head):
        if end is not None and not end.is_low_rank:
            return "has rows or a matrix of its own for the embedding or the output layer"
    return None


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
