"""Large memory in huge pages, which Linux gives to what asks for them."""

from __future__ import annotations

import math
import mmap
import sys

import torch

_HUGE_PAGE = 2 << 20


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory on the CPU, of which nothing is written, in pages of 2 MiB where the system has them.

    In pages of 4 KiB, memory that is read here and there waits for the addresses of its pages. It
    is advice which Linux may not follow (``/sys/kernel/mm/transparent_hugepage/enabled``) and other
    systems do not know.

    The memory is a mapping of its own: it takes what it has and no more, and goes back to the
    system as a whole. What an allocator has in one piece with other memory does neither.
    """
    size = math.prod(shape) * dtype.itemsize
    if sys.platform != "linux" or not size:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Less than a page of 2 MiB cannot be in one; it would only take as much.
    if size >= _HUGE_PAGE:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
