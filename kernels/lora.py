"""Low-rank additions to a projection's output; each row may use another adapter.

A projection may be several linear layers fused into one (q, k, v; gate, up): part ``p`` owns the
outputs ``offsets[p]`` to ``offsets[p + 1]``. An adapter lies in a *slot*, which refers to its own
matrices of each part, ``a (rank, in)`` and ``b (rank, out)``: a slot takes as much memory as the
adapter has ranks. For row ``t`` with slot ``s`` and each part ``p``

    h      = a[s, p] · x[t]        rounded to the dtype of x, as PEFT does
    out[t, offsets[p] : offsets[p+1]] += b[s, p]ᵀ · h

(LoRA, Hu et al. 2021; batched over adapters as in Punica, Chen et al. 2023, and S-LoRA, Sheng et
al. 2023). The factor α/r is part of ``b``. Sums are float32; a row's result does not depend on the
other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# What is in a slot for one part: a (rank, in) and b (rank, out), both contiguous; None for nothing.
LowRank = tuple[Tensor, Tensor] | None
# Matrices on a GPU begin at multiples of as many bytes, so that it can read many at once.
ALIGNMENT = 16


@dataclass(frozen=True)
class LoRASlots:
    """The adapters on one projection, by slot.

    matrices: ``[slot][part]``; keeps alive what the kernels read.
    table: int64 ``(3, slots, parts)`` on the device: where each ``a`` begins in memory, where each
        ``b`` does, and the ranks. The rank is 0 if there is nothing.
    inputs: of the projection. offsets: where each part's outputs begin, then their number.
    max_rank: the highest rank of any part that a slot may have.
    dtype: of the matrices.
    """

    matrices: list[tuple[LowRank, ...]]
    table: Tensor
    inputs: int
    offsets: tuple[int, ...]
    max_rank: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Raises ValueError for a table that a kernel, given only addresses, would misread."""
        shape, dense = (3, len(self.matrices), self.parts), self.table[0].is_contiguous()
        if self.table.shape != shape or self.table.dtype != torch.int64 or not dense:
            raise ValueError(
                f"table is {self.table.dtype} {tuple(self.table.shape)} with strides "
                f"{self.table.stride()}, expected int64 {shape}, each of the three contiguous"
            )

    @property
    def parts(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def empty(
        cls,
        count: int,
        inputs: int,
        offsets: tuple[int, ...],
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> LoRASlots:
        """``count`` slots with nothing in them."""
        parts = len(offsets) - 1
        table = torch.zeros(3, count, parts, dtype=torch.int64, device=device)
        return cls([(None,) * parts] * count, table, inputs, offsets, max_rank, dtype)

    @classmethod
    def of(
        cls, adapters: Sequence[Sequence[LowRank]], inputs: int, offsets: tuple[int, ...]
    ) -> LoRASlots:
        """Slots with these adapters, of which one has a matrix at least."""
        found = [pair for adapter in adapters for pair in adapter if pair is not None]
        first, rank = found[0][0], max(len(a) for a, _ in found)
        slots = cls.empty(len(adapters), inputs, offsets, rank, first.dtype, first.device)
        for slot, adapter in enumerate(adapters):
            entries = slots.put(slot, tuple(adapter))
            slots.table[:, slot] = torch.tensor(entries, device=first.device)
        return slots

    def put(self, slot: int, matrices: tuple[LowRank, ...]) -> list[list[int]]:
        """Have a slot refer to these matrices. Returns ``[3][parts]``, to be put into the table.

        Raises ValueError for matrices that a kernel, given only addresses, would misread.
        """
        for pair, (start, end) in zip(matrices, pairwise(self.offsets), strict=True):
            if pair is not None:
                a, b = pair
                rank = len(a)
                expected = (rank, self.inputs), (rank, end - start)
                fits = (a.shape, b.shape) == expected and 0 < rank <= self.max_rank
                same = a.dtype == b.dtype == self.dtype and a.device == b.device
                dense = a.is_contiguous() and b.is_contiguous()
                aligned = a.device.type == "cpu" or not (a.data_ptr() | b.data_ptr()) % ALIGNMENT
                if not (fits and same and dense and aligned):
                    raise ValueError(
                        f"a {a.dtype} {tuple(a.shape)} and b {b.dtype} {tuple(b.shape)} in slot "
                        f"{slot}: expected contiguous {self.dtype} (rank, {self.inputs}) and "
                        f"(rank, {end - start}), rank 1 to {self.max_rank}"
                    )
        self.matrices[slot] = matrices
        return [
            [0 if pair is None else pair[0].data_ptr() for pair in matrices],
            [0 if pair is None else pair[1].data_ptr() for pair in matrices],
            [0 if pair is None else len(pair[0]) for pair in matrices],
        ]


# Adds to an output ``(rows, top_k, …)``, in place, what adapters make of x: see
# :func:`nybble.kernels.reference.grouped_lora`.
GroupedLoRA = Callable[[Tensor, Tensor, LoRASlots], None]
