"""Large memory in huge pages, which Linux gives to what asks for them."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized memory on the CPU, in pages of 2 MiB where the system offers them.

    In pages of 4 KiB, memory that is read here and there waits for the addresses of its pages. It
    is advice which Linux may not follow (``/sys/kernel/mm/transparent_hugepage/enabled``) and other
    systems do not know.
    """
    made = torch.empty(shape, dtype=dtype)
    if sys.platform == "linux":
        start = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (made.data_ptr() + made.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if size > 0:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return made
