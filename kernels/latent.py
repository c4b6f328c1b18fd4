"""What latent attention computes beside attention, in PyTorch; see ``models.LatentAttention``."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.reference import rows_computed, scaled_to_8_bits


def store_latents(
    latents: Tensor, cache: Tensor, slot_mapping: Tensor, scales: Tensor | None = None
) -> None:
    """Write ``latents (tokens, dim)`` into ``cache (blocks, 1, block_size, dim)``.

    slot_mapping: int64 ``(tokens,)``: block · block_size + offset, or −1 to write nothing.
    scales: float32 ``(blocks, 1, block_size)`` of a cache of 8 bits, as in
        :func:`nybble.kernels.reference.rotary_store`.
    """
    kept = slot_mapping >= 0
    slots, latents = slot_mapping[kept], latents[kept]
    if scales is not None:
        latents, found = scaled_to_8_bits(latents, cache.dtype)
        scales.view(-1)[slots] = found
    cache.view(-1, cache.shape[-1])[slots] = latents.to(cache.dtype)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Each head by a matrix of its own: ``out[t, h] = x[t, h] @ weight[h]``.

    x: ``(tokens, heads, inputs)``; weight: ``(heads, inputs, out)`` of the same dtype.

    Returns ``(tokens, heads, out)``. In bfloat16 rows are padded as those of
    :func:`nybble.kernels.reference.dense_matmul`, so that a row's result does not depend on others.
    """
    rows = x.transpose(0, 1)
    if x.dtype == torch.bfloat16 and x.is_cpu:
        added = rows_computed(len(x)) - len(x)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, added))
    return torch.bmm(rows, weight)[:, : len(x)].transpose(0, 1)
