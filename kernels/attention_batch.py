"""The attention metadata of one step: each sequence's rows and where its KV is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """Prefill chunks and decodes of several sequences, their tokens concatenated.

    query_start: int32 ``(seqs + 1,)``, the first row of each sequence, then the number of rows.
    context_lens: int32 ``(seqs,)``, tokens in the KV cache, including the new ones.
    block_tables: int32 ``(seqs, max_blocks)``, the KV blocks of each sequence in order. Entries of
        blocks that no new token sees are not read, and neither are their blocks.
    slot_mapping: int64 ``(tokens,)``, where each new token's key and value are written.
    max_query: the most rows any sequence has.
    """

    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query: int

    def __post_init__(self) -> None:
        """Raises ValueError for tensors which a kernel, given only addresses, would misread."""
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
