"""The shape of one step's attention: which rows belong to which sequence and where its KV lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """Prefill chunks and decodes of several sequences, their tokens in a row.

    query_start: int32 ``(seqs + 1,)``, the first row of each sequence, then the number of rows.
    context_lens: int32 ``(seqs,)``, tokens in the KV cache, the new ones included.
    block_tables: int32 ``(seqs, max_blocks)``, the KV blocks of each sequence in order. Of those
        that no new token sees neither the entry nor what it names is read.
    slot_mapping: int64 ``(tokens,)``, where each new token's key and value go.
    max_query: the most rows any sequence has.
    """

    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query: int

    def __post_init__(self) -> None:
        """Raises ValueError for what a kernel would misread; it is given addresses alone."""
        seqs = self.context_lens.shape[0]
        expected = {
            "query_start": ((seqs + 1,), torch.int32),
            "context_lens": ((seqs,), torch.int32),
            "block_tables": ((seqs, self.block_tables.shape[-1]), torch.int32),
            "slot_mapping": ((self.slot_mapping.numel(),), torch.int64),
        }
        for name, (shape, dtype) in expected.items():
            tensor: Tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides "
                    f"{tensor.stride()}, expected contiguous {dtype} {shape}"
                )
