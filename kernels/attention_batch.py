"""The shape of one step's attention: which rows belong to which sequence and where its KV lies."""

from __future__ import annotations

from dataclasses import dataclass

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
