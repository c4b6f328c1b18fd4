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

Matrices may be in 8 bits: each row of ``a`` and of ``b`` is codes from −127 to 127, times a scale
of its own. h is rounded once its scale is in it; that of ``b`` is multiplied with h in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Matrices(NamedTuple):
    """a: ``(rank, in)``; b: ``(rank, out)``, both contiguous.

    scales: float32 ``(2, rank)`` of the rows of ``a`` and of ``b``, which then are int8; None for
        matrices of numbers.
    """

    a: Tensor
    b: Tensor
    scales: Tensor | None = None

    def wide(self) -> tuple[Tensor, Tensor]:
        """Both in float32."""
        if self.scales is None:
            return self.a.float(), self.b.float()
        return self.a * self.scales[0, :, None], self.b * self.scales[1, :, None]


# What is in a slot for one part; None for nothing.
LowRank = Matrices | None


def in_8_bits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest int8 codes of each row, and the rows' scales, float32.

    The scale of a row with a number that is not finite is not finite.
    """
    scales = matrix.float().abs().amax(dim=1) / 127
    codes = matrix.float() / torch.where(scales > 0, scales, 1.0)[:, None]
    return codes.round().to(torch.int8), scales


# Matrices on a GPU begin at multiples of as many bytes, so that it can read many at once.
ALIGNMENT = 16


@dataclass(frozen=True)
class LoRASlots:
    """The adapters on one projection, by slot.

    matrices: ``[slot][part]``; keeps alive what the kernels read.
    table: int64 ``(4, slots, parts)`` on the device: where each ``a`` begins in memory, where each
        ``b`` does, the ranks, and where the scales begin. The rank is 0 if there is nothing, and
        the last is 0 for matrices that are not in 8 bits.
    inputs: of the projection. offsets: where each part's outputs begin, then their number.
    max_rank: the highest rank of any part that a slot may have.
    dtype: of the matrices that are not in 8 bits, and of what they are multiplied with.
    """

    matrices: list[tuple[LowRank, ...]]
    table: Tensor
    inputs: int
    offsets: tuple[int, ...]
    max_rank: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Raises ValueError for a table that a kernel, given only addresses, would misread."""
        shape, dense = (4, len(self.matrices), self.parts), self.table[0].is_contiguous()
        if self.table.shape != shape or self.table.dtype != torch.int64 or not dense:
            raise ValueError(
                f"table is {self.table.dtype} {tuple(self.table.shape)} with strides "
                f"{self.table.stride()}, expected int64 {shape}, each of the four contiguous"
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
        table = torch.zeros(4, count, parts, dtype=torch.int64, device=device)
        return cls([(None,) * parts] * count, table, inputs, offsets, max_rank, dtype)

    @classmethod
    def of(
        cls,
        adapters: Sequence[Sequence[LowRank]],
        inputs: int,
        offsets: tuple[int, ...],
        dtype: torch.dtype | None = None,
    ) -> LoRASlots:
        """Slots with these adapters, of which one has a matrix at least.

        dtype: of what they are multiplied with; None for that of the first matrix.
        """
        found = [pair for adapter in adapters for pair in adapter if pair is not None]
        first, rank = found[0].a, max(len(pair.a) for pair in found)
        slots = cls.empty(len(adapters), inputs, offsets, rank, dtype or first.dtype, first.device)
        for slot, adapter in enumerate(adapters):
            entries = slots.put(slot, tuple(adapter))
            slots.table[:, slot] = torch.tensor(entries, device=first.device)
        return slots

    def put(self, slot: int, matrices: tuple[LowRank, ...]) -> list[list[int]]:
        """Have a slot refer to these matrices. Returns ``[4][parts]``, to be put into the table.

        Raises ValueError for matrices that a kernel, given only addresses, would misread.
        """
        for pair, (start, end) in zip(matrices, pairwise(self.offsets), strict=True):
            if pair is not None:
                a, b, scales = pair
                rank = len(a)
                expected = (rank, self.inputs), (rank, end - start)
                fits = (a.shape, b.shape) == expected and 0 < rank <= self.max_rank
                dtype = self.dtype if scales is None else torch.int8
                same = a.dtype == b.dtype == dtype and a.device == b.device
                dense = a.is_contiguous() and b.is_contiguous()
                if scales is not None:
                    fits &= scales.shape == (2, rank) and scales.dtype == torch.float32
                    dense &= scales.is_contiguous()
                aligned = a.device.type == "cpu" or not (a.data_ptr() | b.data_ptr()) % ALIGNMENT
                if not (fits and same and dense and aligned):
                    raise ValueError(
                        f"a {a.dtype} {tuple(a.shape)} and b {b.dtype} {tuple(b.shape)} in slot "
                        f"{slot}: expected contiguous {self.dtype} (rank, {self.inputs}) and "
                        f"(rank, {end - start}), rank 1 to {self.max_rank}, or int8 with float32 "
                        "scales (2, rank)"
                    )
        if len({pair.scales is None for pair in matrices if pair is not None}) > 1:
            raise ValueError(f"slot {slot} has matrices in 8 bits and others")
        self.matrices[slot] = matrices
        return [
            [0 if pair is None else pair.a.data_ptr() for pair in matrices],
            [0 if pair is None else pair.b.data_ptr() for pair in matrices],
            [0 if pair is None else len(pair.a) for pair in matrices],
            [
                0 if pair is None or pair.scales is None else pair.scales.data_ptr()
                for pair in matrices
            ],
        ]


# Adds to an output ``(rows, top_k, …)``, in place, what adapters make of x: see
# :func:`nybble.kernels.reference.grouped_lora`.
GroupedLoRA = Callable[[Tensor, Tensor, LoRASlots], None]
