"""How the matrices of an adapter lie in one piece of memory, in 16 or in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.kernels.lora import ALIGNMENT, LowRank, Matrices


@dataclass(frozen=True)
class AdapterLayout:
    """The linear layers' matrices one after another.

    shapes: inputs and outputs of each linear layer, in the order of computation.
    dtype: of the numbers; int8 for codes with float32 scales of their rows.
    """

    shapes: Sequence[tuple[int, int]]
    dtype: torch.dtype

    @property
    def in_8_bits(self) -> bool:
        return self.dtype == torch.int8

    def size(self, ranks: Sequence[int]) -> int:
        """Numbers of an adapter whose changes of the linear layers have these ranks."""
        return sum(map(sum, self._pieces(ranks)))

    def views(self, memory: Tensor, ranks: Sequence[int]) -> list[LowRank]:
        """Each layer's matrices in ``memory``, which has :meth:`size` numbers."""
        pieces = list(self._pieces(ranks))
        parts = iter(torch.split(memory, [size for each in pieces for size in each]))
        found: list[LowRank] = []
        for rank, (inputs, out), sizes in zip(ranks, self.shapes, pieces, strict=True):
            if not rank:
                found.append(None)
                continue
            a, b, *rest = (next(parts) for _ in sizes)
            scales = None
            if rest:
                scales = rest[0][: 8 * rank].view(torch.float32).view(2, rank)
            pair = a[: rank * inputs].view(rank, inputs), b[: rank * out].view(rank, out)
            found.append(Matrices(*pair, scales))
        return found

    def _pieces(self, ranks: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Of each layer, the numbers of its pieces of memory, rounded up for alignment."""
        for rank, (inputs, out) in zip(ranks, self.shapes, strict=True):
            if not rank:
                yield ()
            elif self.in_8_bits:
                yield tuple(map(self._padded, (rank * inputs, rank * out, 8 * rank)))
            else:
                yield tuple(map(self._padded, (rank * inputs, rank * out)))

    def _padded(self, numbers: int) -> int:
        each = ALIGNMENT // self.dtype.itemsize
        return -(-numbers // each) * each
