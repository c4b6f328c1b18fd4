"""Paged attention: split-KV decode and chunked prefill, both GQA-packed.

Sequences with one new token are decoded, the others prefilled; each kernel finds its own in the
batch, so a mixed batch is two launches. A sequence's path does not depend on others in the step.
Nothing is read back from the device, and the grids do not depend on the context lengths: a decode
launch can be captured in a CUDA graph and replayed as contexts grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.reference import check_sinks
from nybble.kernels.triton.attention_decode import decode
from nybble.kernels.triton.attention_prefill import prefill


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
    if batch.max_query > 1:
        prefill(q, k_cache, v_cache, scales, batch, scale, window, softcap, sinks, out)
    if batch.max_query == 1 or batch.context_lens.shape[0] > 1:
        decode(q, k_cache, v_cache, scales, batch, scale, window, softcap, sinks, out)
    return out
