"""Which block shapes a matmul runs with: a table of measured choices, and a rule for the rest.

The table is data: ``tuned.json`` beside this file, and a cache file of the user's with what was
measured on this machine, at a server's start or by ``python -m nybble.kernels.triton.tune``. The
cache is for one device, one state of the kernels' sources and one version of Triton; any other has
a file of its own. Nothing is measured while serving.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("tuned.json")
BUCKETS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TILE_N = 64
_MEASURED_SOURCES = (
    "matmul.py",
    "few_rows.py",
    "step.py",
    "unpack.py",
    "dequantize.py",
    "opaque.py",
)
STEP = 128


@dataclass(frozen=True)
class Config:
    """How one bucket of rows is computed.

    block_n: outputs of a block.
    block_m: rows of a block.
    splits: programs that share a block's columns.
    tail: if above 0, only the last ``tail`` blocks of outputs are split.
    lead: if above 0, the first part's share of a block's columns, of two parts: half or more.
    scale_first: scale weights before the product (cheaper from 64 rows up). If False, each group's
        product is scaled after it (exact weights, cheaper below).
    dense: dequantize to 16 bits and multiply with the vendor's library. Other fields are ignored.
    overlap: begin while the kernel before is finishing (programmatic dependent launch, sm_90 and
        later; ignored elsewhere).
    parts: if above 1, use the kernel for few rows, whose ``parts`` warps share a block's columns.
        It ignores splits, num_warps and scale_first.
    """

    block_n: int
    block_m: int
    splits: int
    num_warps: int
    num_stages: int
    scale_first: bool
    dense: bool = False
    overlap: bool = False
    parts: int = 1
    tail: int = 0
    lead: float = 0.0


def bucket_of(rows: int) -> int:
    """The smallest bucket that holds ``rows``, so that a new batch size needs no new kernel."""
    return next((b for b in BUCKETS if rows <= b), BUCKETS[-1])


def balanced_splits(blocks: int, steps: int, processors: int) -> int:
    """How many programs should share a block's columns.

    At small batches time is bytes over bandwidth, and bandwidth needs every processor reading, two
    or more blocks each. Take the split with the least work for the busiest processor, counting a
    step and a half to begin a part and half a step to add it, with no part under four steps.
    """

    def cost(splits: int) -> float:
        busiest = -(-blocks * splits // processors)
        return max(busiest, 2) * (-(-steps // splits) + 1.5) + splits / 2

    return min(range(1, min(32, max(1, steps // 4)) + 1), key=cost)


def unequal_parts(blocks: int, steps: int, processors: int) -> tuple[int, float]:
    """The steps of the first of two parts of each block, and the steps until all is done.

    A first part has a processor to itself. The others compute the second parts, some of them one
    after another, and end just before the first ones do: these add them and store no part. A step
    and a half to begin a part are counted, and 2.7 to write it through L2, or to read it there.
    """
    begin, move = 1.5, 2.7
    turns = -(-blocks // (processors - blocks))
    first = math.ceil((turns * (steps + begin + move) - begin) / (turns + 1))
    return first, begin + first + move


def default_config(
    rows: int, out_features: int, columns: int, processors: int = 132, capability: int = 90
) -> Config:
    """A choice from the roofline, not from measurement.

    Under about 300 rows time is bytes over bandwidth: fill the memory pipe. Over it, time is
    arithmetic: the largest block whose accumulators fit in registers and whose stages fit in shared
    memory, wide ones only on Hopper. From 2048 rows up, writing the weight out in 16 bits costs
    less than unpacking it beside the products.
    """
    bucket = bucket_of(rows)
    steps = -(-columns // STEP)
    if bucket <= 8:
        # Every block reads all of x, 4 · rows / block_n of the weight's bytes: from L2, which has
        # about twice the bandwidth of memory.
        block_n = 32 if bucket > 4 or out_features >= 64 * processors else 16
        return Config(block_n, 8, 1, 8, 3, scale_first=False, parts=8)
    if bucket <= 64:
        block_n = 128 if out_features >= 2048 else 64
        splits = balanced_splits(-(-out_features // block_n), steps, processors)
        small = bucket <= 32
        return Config(block_n, bucket, splits, 4 if small else 8, 4 if small else 3, not small)
    blocks_n = -(-out_features // 128)
    # Masks for the end of odd columns take registers that the widest block does not have.
    wide = (
        90 <= capability < 100
        and columns % STEP == 0
        and bucket >= 256
        and 10 * blocks_n * bucket // 256 >= 9 * processors
    )
    block_m = 64 if bucket == 128 else 256 if wide else 128
    blocks = blocks_n * -(-bucket // block_m)
    # Here parts are large beside the weight: split evenly only where half the processors would
    # idle, all the time or while the last wave of blocks runs.
    tail = blocks_n % max(1, processors // (blocks // blocks_n)) if blocks > processors else 0
    split_blocks = tail * blocks // blocks_n if blocks > processors else blocks
    splits = min(processors // split_blocks, max(1, steps // 4)) if split_blocks else 1
    lead = 0.0
    # Unequally where it saves a tenth. Smaller blocks share a multiprocessor, and larger ones have
    # no registers for a part.
    if block_m == 128 and splits < 3 and 0 < split_blocks < processors:
        first, end = unequal_parts(split_blocks, steps, processors)
        whole = steps + 1.5
        before = -(-(blocks - split_blocks) // processors) * whole
        if before + end <= 0.9 * (before + whole):
            splits, lead = 2, first / steps
    if splits < 2:
        splits, tail = 1, 0
    return Config(
        128, block_m, splits, 8, 3, scale_first=True, dense=bucket >= 2048, tail=tail, lead=lead
    )


@lru_cache
def tuned(device: str) -> dict[str, Config]:
    """Measured choices for the device of this name: the shipped ones, and those tuned here."""
    return {**read(SHIPPED).get(device, {}), **read_cache(device)}


def read(path: Path) -> dict[str, dict[str, Config]]:
    """A file's choices by device and key; none if there is no file."""
    if not path.exists():
        return {}
    devices = json.loads(path.read_text())
    return {
        device: {key: Config(**choice) for key, choice in entries.items()}
        for device, entries in devices.items()
    }


def read_cache(device: str) -> dict[str, Config]:
    """What was measured on this machine; nothing, with a warning, if the file is broken."""
    path = cache_path(device)
    try:
        return read(path).get(device, {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is not a table of configurations and is not used: %s", path, error)
        return {}


def write(path: Path, device: str, choices: dict[str, Config]) -> None:
    """Add ``choices`` to a file, replacing earlier ones of the same key."""
    entries = read(path)
    entries[device] = {**entries.get(device, {}), **choices}
    _store(path, entries)


def write_cache(device: str, choices: dict[str, Config]) -> None:
    """Replace the cache's content by ``choices``."""
    _store(cache_path(device), {device: choices})


def _store(path: Path, entries: dict[str, dict[str, Config]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {d: {k: asdict(c) for k, c in sorted(e.items())} for d, e in entries.items()}, indent=1
    )
    partial = path.with_suffix(".tmp")
    partial.write_text(text + "\n")
    partial.replace(path)
    tuned.cache_clear()
    choose.cache_clear()


def cache_path(device: str) -> Path:
    """The file of choices tuned on this machine for these kernels."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9]+", "-", device)
    return root / "nybble" / f"matmul-{name}-{kernels_digest()}.json"


@lru_cache
def kernels_digest() -> str:
    """Changes with the sources a configuration was measured on, and with Triton's version."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for name in _MEASURED_SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:12]


def key_of(affine: bool, group: int, out_features: int, columns: int, bucket: int) -> str:
    """The name of a choice in the table: what decides how much work there is and of what kind."""
    kind = "affine" if affine else "codebook"
    return f"{kind} g{group} {out_features}x{columns} m{bucket}"


@lru_cache(maxsize=4096)
def choose(
    device: str,
    processors: int,
    capability: int,
    affine: bool,
    group: int,
    out_features: int,
    columns: int,
    bucket: int,
) -> Config:
    """The measured choice; the rule's if there is none."""
    found = tuned(device).get(key_of(affine, group, out_features, columns, bucket))
    return found or default_config(bucket, out_features, columns, processors, capability)


def for_group(config: Config, group: int) -> Config:
    """``config``, or what is nearest to it for groups of 16, of which two share a slice.

    Their weights are scaled before the product, each element by its own scale. The scales take
    registers that larger blocks and the kernel for few rows do not have.
    """
    if group != 16:
        return config
    if config.parts > 1:
        config = replace(config, parts=1, block_n=64, block_m=16, splits=8, num_warps=4)
    return replace(
        config,
        scale_first=True,
        block_n=64,
        splits=max(1, config.splits * 64 // config.block_n),
        tail=config.tail * config.block_n // 64,
    )
