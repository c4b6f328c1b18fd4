"""What loading frees between the weights that stay is given back to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from nybble.loaders.memory import trimmed


def resident() -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def test_every_weight_comes_once_and_in_order() -> None:
    assert list(trimmed(range(40))) == list(range(40))
    assert list(trimmed(iter(()))) == []


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="of glibc")
def test_temporaries_between_small_weights_do_not_stay() -> None:
    held = [[torch.ones(10_000) for _ in range(25)] for _ in range(64)]
    full = resident()
    # Every 25th stays, in the middle of those that are freed.
    kept = [blocks[12] for blocks in held]
    del held
    assert list(trimmed(range(16))) == list(range(16))
    assert full - resident() > 40 << 20
    assert len(kept) == 64
