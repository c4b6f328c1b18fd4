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

import torch
from torch import Tensor


def slot_buffers(
    slots: int,
    max_rank: int,
    in_features: int,
    offsets: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Zeroed ``(a, b)`` of the slots, in the memory order that ``lora_add`` reads fastest.

    a ``(slots, parts · max_rank, in_features)``; b ``(slots, offsets[-1], max_rank)``, a view of
    memory in which the outputs of one rank are contiguous, so that padded ranks are never read.
    """
    parts = len(offsets) - 1
    a = torch.zeros(slots, parts * max_rank, in_features, dtype=dtype, device=device)
    b = torch.zeros(slots, max_rank, offsets[-1], dtype=dtype, device=device)
    return a, b.transpose(1, 2)
