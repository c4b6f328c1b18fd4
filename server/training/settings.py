"""Settings of training jobs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass


def default_threads() -> int:
    """Half of this process' processors."""
    found = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, found // 2)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of training jobs.

    device: the device that jobs train on.
    max_rank: the highest rank that the engine serves.
    threads: of a job on the CPU.
    nice: niceness of a job's process, from 0 (as the server) to 19 (the lowest priority).
    """

    device: str
    max_rank: int
    threads: int = 1
    nice: int = 19
