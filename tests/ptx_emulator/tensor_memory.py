"""Tensor memory: 128 lanes of 512 columns of 32 bits (PTX ISA 9.0, 9.7.16.1 and 9.7.16.7.1)."""

from __future__ import annotations

import numpy as np
from memory import MemoryFaultError

LANES, COLUMNS = 128, 512


class TensorMemory:
    """A block's. Full of NaN at first; only allocated columns can be reached.

    first: allocations begin at column 0, or they end at the last one. A kernel must not care.
    """

    def __init__(self, first: bool) -> None:
        self._cells = np.full((LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
        self._allocated = np.zeros(COLUMNS, bool)
        self._held: dict[int, int] = {}
        self._first = first
        self._relinquished = False

    def allocate(self, columns: int) -> int:
        """The address of ``columns`` columns, a power of two from 32 on."""
        if self._relinquished:
            raise RuntimeError("tensor memory allocated after the permit was relinquished")
        if columns < 32 or columns & (columns - 1):
            raise RuntimeError(f"{columns} columns of tensor memory")
        places = range(0, COLUMNS - columns + 1, columns)
        for start in places if self._first else reversed(places):
            if not self._allocated[start : start + columns].any():
                self._allocated[start : start + columns] = True
                self._held[start] = columns
                return start
        raise RuntimeError(f"{columns} columns of tensor memory: a wait that never ends")

    def deallocate(self, address: int, columns: int) -> None:
        if self._held.pop(address, None) != columns:
            raise RuntimeError(f"{columns} columns at {address:#x} are no allocation")
        self._allocated[address : address + columns] = False

    def relinquish(self) -> None:
        self._relinquished = True

    def finish(self) -> None:
        """At the block's end."""
        if self._held:
            raise RuntimeError(f"tensor memory left allocated: {self._held}")

    def load(self, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """uint32, of the shape lanes and columns have together."""
        self._check(lanes, columns)
        return self._cells[lanes, columns]

    def store(self, lanes: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        self._check(lanes, columns)
        self._cells[lanes, columns] = values

    def _check(self, lanes: np.ndarray, columns: np.ndarray) -> None:
        if lanes.max() >= LANES or columns.max() >= COLUMNS or not self._allocated[columns].all():
            raise MemoryFaultError(
                f"tensor memory at lanes {lanes.min()}…{lanes.max()}, columns "
                f"{columns.min()}…{columns.max()}; allocated are {self._held}"
            )
