"""Where training jobs are kept, and their limits."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


def default_threads() -> int:
    """Half of this process' processors."""
    found = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, found // 2)


def default_state() -> Path:
    """As the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "nybble"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of training jobs.

    state: the folder of files, jobs and adapters; only one server at a time may use it.
    device: the device that jobs train on.
    max_rank: the highest rank that the engine serves.
    max_file_bytes: limit for one uploaded file.
    quota_bytes: limit for all files of one tenant together.
    threads: of a job on the CPU.
    """

    state: Path
    device: str
    max_rank: int
    max_file_bytes: int = 512 << 20
    quota_bytes: int = 4 << 30
    threads: int = 1
