"""A GPU's memory for adapters: one buffer, in which they lie one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class AdapterMemory:
    """Memory for ``numbers`` numbers, of which each slot has as many as its adapter takes.

    When the end is reached, the adapters are moved together, so that what is free is one piece:
    an adapter fits if its numbers are free, wherever they are. Moving is a copy on the device, in
    the order of the kernels' launches.
    """

    def __init__(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(numbers, dtype=dtype, device=device)
        # Where each slot's numbers begin, how many they are, and the ranks of the adapter; in the
        # order of their places.
        self._held: dict[int, tuple[int, int, Sequence[int]]] = {}
        self._end = 0

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return len(self._memory)

    @property
    def free(self) -> int:
        """How many numbers no slot has."""
        return self.size - sum(length for _, length, _ in self._held.values())

    def length(self, slot: int) -> int:
        """How many numbers a slot has."""
        return self._held[slot][1] if slot in self._held else 0

    def ranks(self, slot: int) -> Sequence[int]:
        return self._held[slot][2]

    def release(self, slot: int) -> None:
        self._held.pop(slot, None)

    def put(self, slot: int, adapter: Tensor, ranks: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Copy an adapter into the memory. Returns the slots that have moved, and this one.

        Each with its numbers. Raises ValueError if there are too few.
        """
        if len(adapter) > self.free:
            raise ValueError(
                f"an adapter of {len(adapter)} numbers does not fit: {self.free} are free"
            )
        moved = self._move_together() if self._end + len(adapter) > len(self._memory) else []
        self._held[slot] = self._end, len(adapter), ranks
        self._end += len(adapter)
        self.numbers(slot).copy_(adapter, non_blocking=True)
        return ((each, self.numbers(each)) for each in (*moved, slot))

    def _move_together(self) -> list[int]:
        moved = []
        self._end = 0
        for slot, (start, length, ranks) in self._held.items():
            if start != self._end:
                # What is read and what is written may overlap.
                self._memory[self._end : self._end + length] = self.numbers(slot).clone()
                self._held[slot] = self._end, length, ranks
                moved.append(slot)
            self._end += length
        return moved

    def numbers(self, slot: int) -> Tensor:
        start, length, _ = self._held[slot]
        return self._memory[start : start + length]
