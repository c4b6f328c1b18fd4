"""Which block shapes a matmul runs with: a table of measured choices, and a rule for the rest.

The table is data, ``tuned.json`` beside this file, written by ``python -m
nybble.kernels.triton.tune`` on the device it names. Nothing is measured while serving.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TUNED = Path(__file__).with_name("tuned.json")
BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TILE_N = 64
STEP = 128


@dataclass(frozen=True)
class Config:
    """How one bucket of rows is computed.

    block_n, block_m: outputs and rows of a block. splits: programs sharing a block's columns.
    scale_first: whether weights are scaled before the product (cheaper from 64 rows up) or each
    group's product after it (exact weights, cheaper below). dense: dequantize to 16 bits and leave
    the product to the vendor's library; the other fields then do not matter.
    """

    block_n: int
    block_m: int
    splits: int
    num_warps: int
    num_stages: int
    scale_first: bool
    dense: bool = False


def bucket_of(rows: int) -> int:
    """The smallest bucket that holds ``rows``, so that a new batch size needs no new kernel."""
    return next((b for b in BUCKETS if rows <= b), BUCKETS[-1])


def balanced_splits(blocks: int, steps: int, processors: int) -> int:
    """How many programs should share a block's columns.

    At small batches time is bytes over bandwidth, and bandwidth needs every processor reading, two
    or more blocks each. Take the split with the least work for the busiest processor, counting half
    a step for each further part that must be written and added, with no part under four steps.
    """

    def cost(splits: int) -> float:
        busiest = -(-blocks * splits // processors)
        return max(busiest, 2) * -(-steps // splits) + splits / 2

    return min(range(1, min(32, max(1, steps // 4)) + 1), key=cost)


def default_config(rows: int, out_features: int, columns: int, processors: int = 132) -> Config:
    """A choice from the roofline: under about 300 operations a byte, fill the memory pipe; over
    it, the largest block whose accumulators fit in registers."""
    bucket = bucket_of(rows)
    steps = -(-columns // STEP)
    if bucket <= 32:
        splits = balanced_splits(-(-out_features // TILE_N), steps, processors)
        return Config(TILE_N, bucket, splits, num_warps=4, num_stages=4, scale_first=False)
    if bucket <= 128:
        splits = balanced_splits(-(-out_features // TILE_N), steps, processors)
        return Config(TILE_N, bucket, splits, num_warps=4, num_stages=3, scale_first=True)
    blocks = -(-out_features // 128) * -(-bucket // 128)
    splits = balanced_splits(blocks, steps, processors) if blocks < processors else 1
    return Config(
        128, 128, splits, num_warps=8, num_stages=3, scale_first=True, dense=bucket >= 4096
    )


@lru_cache
def tuned(path: Path = TUNED) -> dict[str, Config]:
    """The measured table: ``"capability/kind/group/out×columns/bucket"`` to a configuration."""
    if not path.exists():
        return {}
    return {key: Config(**value) for key, value in json.loads(path.read_text()).items()}
