"""What a kernel may touch: the tensors it was given, and its block's shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
from torch import Tensor

Bytes = np.ndarray


class MemoryFaultError(Exception):
    """An access outside what a kernel was given, or one that is not aligned to its size."""


class GlobalMemory:
    """The storages of some tensors, at their own addresses: kernels read and write them there."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self._regions = [
            (start, np.frombuffer((ctypes.c_uint8 * len(s)).from_address(start), np.uint8))
            for start, s in storages.items()
            if len(s)
        ]

    def _region(self, addresses: np.ndarray, size: int) -> tuple[Bytes, np.ndarray]:
        _check_alignment(addresses, size)
        first, last = int(addresses.min()), int(addresses.max())
        for start, region in self._regions:
            if start <= first and last + size <= start + len(region):
                return region, (addresses - np.uint64(start)).astype(np.int64)
        known = ", ".join(f"{s:#x}+{len(r):#x}" for s, r in self._regions)
        raise MemoryFaultError(f"{size} bytes at {first:#x}…{last:#x}, tensors are at {known}")

    def load(self, addresses: np.ndarray, size: int) -> Bytes:
        """``(n, size)`` bytes."""
        region, at = self._region(addresses, size)
        return region[at[:, None] + np.arange(size)]

    def store(self, addresses: np.ndarray, values: Bytes) -> None:
        region, at = self._region(addresses, values.shape[1])
        region[at[:, None] + np.arange(values.shape[1])] = values


class SharedMemory:
    """Full of NaN at first: nothing right comes of what was not written."""

    def __init__(self, size: int) -> None:
        self._bytes = np.full(size, 0xFF, np.uint8)

    def _at(self, addresses: np.ndarray, size: int) -> np.ndarray:
        _check_alignment(addresses, size)
        at = addresses.astype(np.int64)
        if at.min() < 0 or at.max() + size > len(self._bytes):
            raise MemoryFaultError(
                f"{size} bytes of shared memory at {at.min()}…{at.max()} of {len(self._bytes)}"
            )
        return at[..., None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int) -> Bytes:
        return self._bytes[self._at(addresses, size)]

    def store(self, addresses: np.ndarray, values: Bytes) -> None:
        self._bytes[self._at(addresses, values.shape[-1])] = values


def _check_alignment(addresses: np.ndarray, size: int) -> None:
    if (addresses % np.array(size, addresses.dtype)).any():
        raise MemoryFaultError(f"{size} bytes at {int(addresses[0]):#x}, which is not aligned")
