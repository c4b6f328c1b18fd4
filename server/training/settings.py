"""Where training jobs are kept, and what they may take."""

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
    """state: the folder of files, jobs and adapters; one server at a time has it. device: that jobs
    train on. max_rank: of adapters, as the engine serves them. max_file_bytes: of one uploaded
    file. quota_bytes: of all files of one tenant together. threads: of a job on the CPU.
    """

    state: Path
    device: str
    max_rank: int
    max_file_bytes: int = 512 << 20
    quota_bytes: int = 4 << 30
    threads: int = 1
