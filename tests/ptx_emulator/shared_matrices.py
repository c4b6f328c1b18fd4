"""Matrices in shared memory as tensor cores read them, through a descriptor.

PTX ISA 9.0: "Strides" and "Swizzling modes" for wgmma (9.7.15.5.1), "Canonical layouts" for tcgen05
(9.7.16.3.3). Both lay elements out alike and differ in the descriptors' bits alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from memory import SharedMemory

DEPTH = 16  # columns of 16-bit elements that one instruction multiplies


@dataclass(frozen=True)
class Matrix:
    """``(size, 16)`` elements of 16 bits, ``size`` the dimension that is kept.

    leading, stride: bytes, what the ISA calls leading and stride dimension byte offset. span: bytes
    of a swizzled row, 16 where nothing is swizzled. transposed: eight elements that are neighbours
    in memory are so along ``size``, not along the columns.
    """

    start: int
    leading: int
    stride: int
    span: int
    transposed: bool

    @classmethod
    def of(cls, descriptor: int, span: int, transposed: bool) -> Matrix:
        """The fields that both kinds of descriptors have at the same bits."""
        if descriptor >> 49 & 7:
            raise NotImplementedError("a base offset in a matrix descriptor")
        start, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
        return cls(start, leading, stride, span, transposed)

    def read(self, shared: SharedMemory, size: int, kind: str) -> np.ndarray:
        """float32 ``(size, 16)`` of what the asynchronous proxy sees."""
        eights = shared.load_asynchronously(_places(self, size), 16).view(np.uint16)
        if self.transposed:
            eights = eights.swapaxes(1, 2)
        return floats(eights.reshape(size, DEPTH), kind)


@lru_cache(maxsize=1024)
def _places(matrix: Matrix, size: int) -> np.ndarray:
    """Where eight neighbours lie: ``(size, 2)``, or transposed ``(size / 8, 16)``."""
    if not matrix.transposed:
        # 8 rows of ``span`` bytes make an atom; atoms are ``stride`` apart along the rows.
        row, eight = np.arange(size)[:, None], np.arange(DEPTH // 8)[None, :]
        byte = row // 8 * matrix.stride + row % 8 * matrix.span
        byte = byte + eight * (16 if matrix.span > 16 else matrix.leading)
    else:
        eight, k = np.arange(size // 8)[:, None], np.arange(DEPTH)[None, :]
        each = matrix.span // 16  # eights along ``size`` in an atom
        along, deep = matrix.leading, matrix.stride
        if each == 1:
            along, deep = deep, along
        byte = eight // each * along + eight % each * 16 + k // 8 * deep + k % 8 * matrix.span
    at = matrix.start + byte
    return (at ^ ((at >> 7 & (matrix.span // 16 - 1)) << 4)).astype(np.uint32)


def floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """float32 of 16-bit floats, two to a register: ``(…, n)`` registers to ``(…, 2n)``."""
    halves = np.ascontiguousarray(bits).view(np.uint16)
    if kind == "bf16":
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return halves.view(np.float16).astype(np.float32)
