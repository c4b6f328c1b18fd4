"""Failures of the engine thread: what happened, and whether it may restart."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

# PyTorch's allocator for the CPU has no exception of its own.
_CPU_ALLOCATOR = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on the device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # Errors derived from it may quote what another process lacked.
    return type(error) is RuntimeError and _CPU_ALLOCATOR in str(error)


def describe(error: BaseException) -> str:
    """One line of bounded length."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Restarts:
    """Allows ``attempts`` within any ``seconds``."""

    def __init__(
        self, attempts: int, seconds: float = 600, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.taken = 0
        self._attempts = attempts
        self._seconds = seconds
        self._clock = clock
        self._times: deque[float] = deque()

    def take(self) -> bool:
        """Count one more attempt; returns False if that would be too many."""
        now = self._clock()
        while self._times and now - self._times[0] > self._seconds:
            self._times.popleft()
        if len(self._times) >= self._attempts:
            return False
        self._times.append(now)
        self.taken += 1
        return True
