"""Finds, on the device, which rows each block of a grid computes if rows are routed.

Rows are sorted by what they were routed to (an expert, or an adapter of an expert), and cut into
blocks of rows of one. The grid has as many blocks as any routing of so many rows can need, and
those that are left over end at once. So nothing waits for the host, shapes do not depend on the
routing, and a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Which rows each block of the grid computes; "expert" stands for whatever they are routed to.

    order: int32 ``(rows · top_k,)``, places in ``(rows, top_k)``, sorted by expert.
    expert_of: int32 ``(blocks,)``; −1 for a block that is left over.
    first_of: int32 ``(blocks,)``, where the rows of each block begin in ``order``.
    end_of: int32 ``(experts,)``, where the rows of each expert end in ``order``.
    """

    order: Tensor
    expert_of: Tensor
    first_of: Tensor
    end_of: Tensor

    @classmethod
    def of(cls, expert_ids: Tensor, experts: int, block_m: int) -> Blocks:
        """For int64 ``expert_ids (rows, top_k)``; all shapes follow from its shape alone.

        A place with the id ``experts`` is in no block.
        """
        flat = expert_ids.flatten()
        count = most_blocks(len(flat), experts, block_m)
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
        counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:experts]
        ends, blocks = counts.cumsum(0), (counts + block_m - 1) // block_m
        block_ends = blocks.cumsum(0)
        index = torch.arange(count, device=flat.device)
        expert = torch.searchsorted(block_ends, index, right=True)
        known = expert.clamp(max=experts - 1)
        before = index - (block_ends - blocks)[known]
        return cls(
            flat.argsort(stable=True).int(),
            torch.where(expert < experts, expert, -1).int(),
            ((ends - counts)[known] + before * block_m).int(),
            ends.int(),
        )


def most_blocks(places: int, experts: int, block_m: int) -> int:
    """The most blocks that any routing needs: each expert's last block may hold a single row."""
    used = min(experts, places)
    return (places + used * (block_m - 1)) // block_m
