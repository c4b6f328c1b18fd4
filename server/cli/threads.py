"""How many threads compute on a CPU, said before the libraries that read it are loaded."""

from __future__ import annotations

import os


def use_threads(count: int | None) -> None:
    """Let PyTorch, the C++ kernels and the processes that this one starts use so many threads.

    None leaves it to OMP_NUM_THREADS, or to OpenMP. Without effect once PyTorch is imported.
    """
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
