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
    """Full of NaN at first: nothing right comes of what was not written.

    Tensor cores read it through the asynchronous proxy, which sees NaN where threads wrote after
    the last proxy fence (PTX ISA 9.0, 9.7.16.6.5).
    """

    def __init__(self, size: int) -> None:
        self._bytes = np.full(size, 0xFF, np.uint8)
        self._unfenced = np.zeros(size, bool)
        self._reserved: dict[int, int] = {}

    def _at(self, addresses: np.ndarray, size: int) -> np.ndarray:
        _check_alignment(addresses, size)
        at = addresses.astype(np.int64)
        first, last = at.min(), at.max() + size
        if first < 0 or last > len(self._bytes):
            raise MemoryFaultError(
                f"{size} bytes of shared memory at {first}…{last - size} of {len(self._bytes)}"
            )
        for start, length in self._reserved.items():
            apart = first >= start + length or last <= start  # most are
            if not apart and ((at < start + length) & (at + size > start)).any():
                raise MemoryFaultError(f"shared memory at {start}, where an mbarrier is")
        return at[..., None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int) -> Bytes:
        return self._bytes[self._at(addresses, size)]

    def load_asynchronously(self, addresses: np.ndarray, size: int) -> Bytes:
        at = self._at(addresses, size)
        return np.where(self._unfenced[at], np.uint8(0xFF), self._bytes[at])

    def store(self, addresses: np.ndarray, values: Bytes) -> None:
        at = self._at(addresses, values.shape[-1])
        self._bytes[at] = values
        self._unfenced[at] = True

    def fence(self) -> None:
        """fence.proxy.async: what was written so far is there for the asynchronous proxy too."""
        self._unfenced[:] = False

    def reserve(self, address: int, size: int) -> None:
        """For an mbarrier: nothing else may be there before it is released."""
        self._at(np.array([address], np.uint32), size)
        self._reserved[address] = size

    def release(self, address: int) -> None:
        self._bytes[address : address + self._reserved.pop(address)] = 0xFF


def _check_alignment(addresses: np.ndarray, size: int) -> None:
    if (addresses % np.array(size, addresses.dtype)).any():
        raise MemoryFaultError(f"{size} bytes at {int(addresses[0]):#x}, which is not aligned")
