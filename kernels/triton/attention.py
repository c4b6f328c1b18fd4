"""Paged attention: split-KV decode and chunked prefill, both GQA-packed.

Sequences with one new token are decoded, so are those with few, and the others are prefilled; each
kernel finds its own in the batch. A sequence's path, and how its keys are split, do not depend on
others in the step. Nothing is read back from the device, and the grids do not depend on the context
lengths: a decode launch can be captured in a CUDA graph and replayed as contexts grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.reference import check_sinks
from nybble.kernels.triton.attention_decode import (
    decode,
    max_splits,
    programs_at_once,
    short_tokens,
)
from nybble.kernels.triton.attention_prefill import prefill, prefill_splitting
from nybble.kernels.triton.attention_splits import Splitting, batches_of, reduce
from nybble.kernels.triton.device import device_traits


def splitting_of(q_heads: int, kv_heads: int, dim: int, multiprocessors: int) -> Splitting:
    """How the keys of a model with such heads are split on such a device."""
    group = q_heads // kv_heads
    most = max_splits(kv_heads, programs_at_once(dim, multiprocessors))
    piece, pieces = prefill_splitting(group, kv_heads, dim, multiprocessors)
    return Splitting(most, short_tokens(group, dim), piece, min(pieces, most))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """See :func:`nybble.kernels.reference.paged_attention`. Heads of a row must be contiguous."""
    tokens, q_heads, dim = q.shape
    if sinks is not None:
        check_sinks(sinks, q_heads)
    out = torch.empty(tokens, q_heads * dim, dtype=q.dtype, device=q.device)
    scales = None if k_scales is None or v_scales is None else (k_scales, v_scales)
    _, multiprocessors, _ = device_traits(q.device)
    splitting = splitting_of(q_heads, k_cache.shape[1], dim, multiprocessors)
    for few, parts in batches_of(batch, splitting, q, dim):
        inputs = q, k_cache, v_cache, scales, few, scale, window, softcap, sinks, out
        if few.may_have(splitting.short + 1):
            prefill(*inputs, parts, splitting)
        if splitting.short > 1 and few.may_have(2, splitting.short):
            decode(*inputs, parts, splitting, short=True)
        if few.may_have(1, 1):
            decode(*inputs, parts, splitting, short=False)
        reduce(few, parts, splitting, window, out, q_heads)
    return out
