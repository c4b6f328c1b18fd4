"""What the C++ kernels are given, checked: they get only addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.routing import Routing

CACHES = (
    "contiguous caches (blocks, KV heads, block size, dim), bfloat16, or int8 with contiguous "
    "float32 scales (blocks, KV heads, block size)"
)


def takes_cache(cache: Tensor, scales: Tensor | None) -> bool:
    return cache.dtype == (torch.bfloat16 if scales is None else torch.int8)


def caches_match(
    k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> bool:
    """Whether the caches, of the right shape, are such as CACHES says."""
    both = k_cache, v_cache
    if k_scales is None or v_scales is None:
        return k_scales is v_scales and all(
            cache.dtype == torch.bfloat16 and cache.is_contiguous() for cache in both
        )
    return all(
        cache.dtype == torch.int8
        and scales.dtype == torch.float32
        and scales.shape == cache.shape[:3]
        and cache.is_contiguous()
        and scales.is_contiguous()
        for cache, scales in zip(both, (k_scales, v_scales), strict=True)
    )


def out_of_memory(kernel: str) -> MemoryError:
    return MemoryError(f"no memory for the buffers of nybble_{kernel}")


def misread(expected: str, **given: Tensor) -> ValueError:
    shown = (
        f"{name}: {t.dtype} {tuple(t.shape)} strides {t.stride()}" for name, t in given.items()
    )
    return ValueError(f"the CPU kernels take {expected}; given {', '.join(shown)}")


# kernels/cpu/routing.cpp has the same numbers.
SCORINGS = "softmax", "sigmoid", "softmax_of_chosen"


def takes_choice(router: Routing, experts: int, top_k: int) -> bool:
    """Whether so many of these experts can be chosen, by groups if the router has any."""
    each = experts // router.groups
    return (
        experts % router.groups == 0
        and each >= (2 if router.group_score == "top2" else 1)
        and 0 < top_k <= each * router.topk_groups
    )
