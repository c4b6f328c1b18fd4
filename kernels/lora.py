"""Low-rank additions to a projection's output; each row may use another adapter.

Adapters are stored in *slots* of one device buffer per projection. A projection may be
several fused into one (q, k, v; gate, up): part ``p`` owns the outputs ``offsets[p]`` to
``offsets[p + 1]`` and a section of the shrinking matrix. For row ``t`` with slot ``s`` and each
part ``p``

    h      = a[s, p·max_rank : (p+1)·max_rank] · x[t]        rounded to the dtype of x, as PEFT does
    out[t, offsets[p] : offsets[p+1]] += b[s, offsets[p] : offsets[p+1]] · h

(LoRA, Hu et al. 2021; batched over adapters as in Punica, Chen et al. 2023, and S-LoRA, Sheng et
al. 2023). The factor α/r is part of ``b``. Sums are float32; a row's result does not depend on the
other rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nybble.kernels.cpu.library import library
from nybble.kernels.lora_batch import LoRABatch

__all__ = ["LoRABatch", "lora_add", "lora_add_reference", "slot_buffers"]


def slot_buffers(
    slots: int,
    max_rank: int,
    in_features: int,
    offsets: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Zeroed ``(a, b)`` for :func:`lora_add`, in the memory order its kernels read fastest.

    a ``(slots, parts · max_rank, in_features)``; b ``(slots, offsets[-1], max_rank)``, a view of
    memory in which the outputs of one rank are contiguous, so that padded ranks are never read.
    """
    parts = len(offsets) - 1
    a = torch.zeros(slots, parts * max_rank, in_features, dtype=dtype, device=device)
    b = torch.zeros(slots, max_rank, offsets[-1], dtype=dtype, device=device)
    return a, b.transpose(1, 2)


def lora_add(
    out: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Tensor,
    offsets: tuple[int, ...],
    batch: LoRABatch,
) -> None:
    """Add every row's adapter to ``out (tokens, offsets[-1])`` in place.

    x: ``(tokens, in_features)``; x and out are contiguous.
    a, b: from :func:`slot_buffers`, zero beyond each slot's rank.
    ranks: int32 ``(slots,)``, 0 for a slot whose adapter does not change this projection.
    """
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        from nybble.kernels.triton import lora

        return lora.lora_add(out, x, a, b, ranks, offsets, batch)
    alike = out.dtype == x.dtype == a.dtype == b.dtype == torch.bfloat16
    cpu = library() if x.is_cpu and alike else None
    kernel = cpu.lora_add if cpu is not None else lora_add_reference
    kernel(out, x, a, b, ranks, offsets, batch)


def lora_add_reference(
    out: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Tensor,
    offsets: tuple[int, ...],
    batch: LoRABatch,
) -> None:
    """:func:`lora_add` in plain PyTorch, on any device and dtype."""
    max_rank = b.shape[2]
    starts = batch.segment_starts.tolist()
    for index, slot in enumerate(batch.segment_slots.tolist()):
        rank = int(ranks[slot])
        rows = batch.order[starts[index] : starts[index + 1]].long()
        wide = x[rows].float()
        for part, (start, end) in enumerate(pairwise(offsets)):
            shrink = a[slot, part * max_rank : part * max_rank + rank]
            h = (wide @ shrink.float().T).to(x.dtype).float()
            total = out[rows, start:end].float() + h @ b[slot, start:end, :rank].float().T
            out[rows, start:end] = total.to(out.dtype)
