"""The attention metadata of one step: each sequence's rows and where its KV is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    rows: of each sequence, so that nothing is launched for sequences which are not there; None if
        they are not known, as in a captured graph whose next batches have others.
    """

    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query: int
    rows: tuple[int, ...] | None = None

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
        if self.rows is not None and len(self.rows) != seqs:
            raise ValueError(f"rows has {len(self.rows)} entries, expected one of {seqs} sequences")

    def may_have(self, fewest: int, most: int | None = None) -> bool:
        """Whether a sequence may have at least ``fewest`` rows and at most ``most``."""
        if self.rows is not None:
            return any(fewest <= rows and (most is None or rows <= most) for rows in self.rows)
        return fewest <= self.max_query

    def longer_than(self, rows: int, tokens: int) -> int:
        """How many sequences may have more than ``rows`` rows, of ``tokens`` rows together."""
        if self.rows is not None:
            return sum(own > rows for own in self.rows)
        return min(self.context_lens.shape[0], tokens // (rows + 1))

    def part(self, first: int, last: int) -> AttentionBatch:
        """Sequences ``first`` … ``last − 1``, whose rows remain where they are."""
        return replace(
            self,
            query_start=self.query_start[first : last + 1],
            context_lens=self.context_lens[first:last],
            block_tables=self.block_tables[first:last],
            rows=None if self.rows is None else self.rows[first:last],
        )
