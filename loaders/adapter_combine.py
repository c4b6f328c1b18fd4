"""Several adapters as one, with weights, as PEFT's ``add_weighted_adapter`` combines them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

import torch

from nybble.loaders.adapter import LoRAAdapter, LoRAModule
from nybble.loaders.errors import AdapterError

Combination = Literal["cat", "linear"]


def combine_adapters(
    adapters: Sequence[LoRAAdapter], weights: Sequence[float], *, combination: Combination = "cat"
) -> LoRAAdapter:
    """Combine adapters into one in float32. A module may occur in only some of them.

    cat: exactly the weighted sum of the adapters' changes; ranks add up.
    linear: the weighted sums of the A and of the B matrices, each scaled by the square root of the
        weight (with the factor α/r). Their product also mixes one adapter's A with another's B.
        Ranks must be equal.
    Raises AdapterError if there is not one weight for each adapter, if ranks differ, or if an
    adapter has DoRA or biases, which are not sums.
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
    names = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
    modules = {}
    for name in names:
        factors = [
            (adapter.modules[name], weight * adapter.modules[name].scale)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.modules
        ]
        modules[name] = _cat(factors) if combination == "cat" else _linear(name, factors)
    digest = blake2b(repr((combination, list(weights))).encode(), digest_size=16)
    for adapter in adapters:
        digest.update(adapter.digest)
    return LoRAAdapter(modules, digest.digest())


def _cat(factors: Sequence[tuple[LoRAModule, float]]) -> LoRAModule:
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
