"""Measures configurations of the matmul on this GPU and keeps the best.

    python -m nybble.kernels.triton.tune [--shapes 4096x4096,4096x22016] [--minutes 8] [--ship]

Shapes are inputs × outputs. Choices go to the user's cache, which every later start reads;
``--ship`` writes them to the table in the repository instead. Each bucket of rows is a search from
the rule's choice: one field is changed at a time and a change that is faster is kept. A candidate
that does not fit the device, or whose result differs from the rule's, is skipped.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, PackedWeight
from nybble.kernels.progress import Progress, track
from nybble.kernels.triton import timing
from nybble.kernels.triton.configs import (
    BUCKETS,
    SHIPPED,
    Config,
    cache_path,
    default_config,
    key_of,
    read_cache,
    tuned,
    write,
    write_cache,
)
from nybble.kernels.triton.dequantize import stored_columns
from nybble.kernels.triton.device import device_traits
from nybble.kernels.triton.matmul import packed_matmul, takes

logger = logging.getLogger(__name__)

SHAPES = "4096x4096,4096x6144,4096x12288,4096x22016,4096x28672,11008x4096,14336x4096,5120x15360"
CACHE_BYTES = 200 << 20  # weights rotated through, several times any L2 cache
START_MINUTES = 5.0  # limit during a server's start; the next start continues

# Milliseconds of a product (weights, input, expected result, configuration), inf for unusable.
Measure = Callable[[list[PackedWeight], Tensor, Tensor, Config], float]


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one field, or in which kernel they are for."""
    if config.parts > 1:
        yield replace(config, overlap=not config.overlap)
        for block_n in (16, 32, 64):
            yield replace(config, block_n=block_n)
        for parts in (4, 8, 16):
            yield replace(config, parts=parts)
        for num_stages in (2, 3, 4, 5):
            yield replace(config, num_stages=num_stages)
        for splits in (2, 4, 8):
            yield replace(config, parts=1, block_n=128, splits=splits, num_warps=4)
        return
    if config.block_m <= 16:
        yield replace(config, parts=8, block_n=32)
    yield replace(config, dense=not config.dense)
    yield replace(config, overlap=not config.overlap)
    for splits in (config.splits * 2, config.splits // 2, config.splits + 1, config.splits - 1):
        if 1 <= splits <= 32:
            yield replace(config, splits=splits, lead=0.0)
    if config.tail:
        yield replace(config, splits=1, tail=0, lead=0.0)
    if config.lead:
        yield replace(config, lead=0.0)
    if config.block_m >= 64:
        shares = (config.lead - 0.05, config.lead + 0.05) if config.lead else (0.55, 0.7)
        for lead in shares:
            if 0.5 <= lead < 1:
                yield replace(config, splits=2, lead=round(lead, 3))
    for block_n in (64, 128, 256):
        yield replace(config, block_n=block_n, splits=max(1, config.splits * block_n // 128))
    for block_m in (config.block_m // 2, config.block_m * 2):
        if 8 <= block_m <= 256:
            yield replace(config, block_m=block_m)
    for num_warps in (4, 8):
        yield replace(config, num_warps=num_warps)
    for num_stages in (2, 3, 4, 5, 6):
        yield replace(config, num_stages=num_stages)
    yield replace(config, scale_first=not config.scale_first)


def search(start: Config, measure: Callable[[Config], float], rounds: int = 2) -> Config:
    """The fastest found by changing one field at a time; ``measure`` says inf for unusable."""
    seen = {start: measure(start)}
    best = start
    for _ in range(rounds):
        before = best
        for candidate in neighbours(best):
            if candidate not in seen:
                seen[candidate] = measure(candidate)
            # A gain under one percent is within the noise of the clock.
            if seen[candidate] < 0.99 * seen[best]:
                best = candidate
        if best == before:
            break
    return best


def measured(weights: list[PackedWeight], x: Tensor, expected: Tensor, config: Config) -> float:
    """Milliseconds of one product, inf if it does not fit or is wrong."""
    try:
        found = packed_matmul(x, weights[0], config)
    except OutOfResources:
        return float("inf")
    error = (found - expected).float().norm() / expected.float().norm()
    if not error < 1e-2:
        return float("inf")
    return timing.milliseconds([partial(packed_matmul, x, w, config) for w in weights], 5)


def rotated(weight: PackedWeight) -> list[PackedWeight]:
    """Copies of a weight that together outgrow the cache."""
    count = min(24, max(2, -(-CACHE_BYTES // weight.nbytes)))
    return [weight, *(replace(weight, qweight=weight.qweight.clone()) for _ in range(count - 1))]


def tune(
    weights: Iterable[PackedWeight],
    dtype: torch.dtype,
    max_rows: int,
    *,
    minutes: float = float("inf"),
    known: Container[str] = (),
    keep: Callable[[str, Config], None] = lambda key, config: None,
    measure: Measure = measured,
    progress: Progress = True,
) -> dict[str, Config]:
    """The best configuration of each distinct weight and bucket, by its key in the table.

    weights: on the device, in ``gpu_tiles``.
    minutes: the time limit. A search cut off by it is discarded.
    known: keys to leave out.
    keep: called with each result at once.

    The small batches of decoding come first.
    """
    deadline = time.monotonic() + 60 * minutes
    work: dict[str, tuple[PackedWeight, int]] = {}
    taken = [weight for weight in weights if takes(weight, dtype)]
    for bucket in (bucket for bucket in BUCKETS if bucket < 2 * max_rows):
        for weight in taken:
            group = 0 if weight.groups == 1 else weight.group_size
            size = (weight.out_features, stored_columns(weight))
            key = key_of(weight.is_affine, group, *size, bucket)
            if key not in known:
                work.setdefault(key, (weight, bucket))
    best: dict[str, Config] = {}

    def in_time(*product: Any) -> float:
        return measure(*product) if time.monotonic() < deadline else float("inf")

    for key, (weight, bucket) in track(work.items(), "Tuning matmuls", progress):
        if time.monotonic() > deadline:
            break
        x = torch.randn(bucket, weight.in_features, device=weight.qweight.device).to(dtype)
        size = (weight.out_features, stored_columns(weight))
        start = default_config(bucket, *size, *device_traits(x.device)[1:])
        expected = packed_matmul(x, weight, start)
        found = search(start, partial(in_time, rotated(weight), x, expected))
        if time.monotonic() < deadline:
            best[key] = found
            keep(key, found)
    if len(best) < len(work):
        logger.info(
            "%d of %d matmuls keep the rule's configuration", len(work) - len(best), len(work)
        )
    return best


def tune_unknown(
    weights: Iterable[PackedWeight],
    dtype: torch.dtype,
    max_rows: int,
    *,
    minutes: float = START_MINUTES,
    measure: Measure = measured,
    progress: Progress = True,
) -> int:
    """Tune what neither the table nor the cache knows of these weights' device; returns how much.

    Every result is cached at once, so that a killed process loses only one search.
    """
    weights = list(weights)
    if not weights:
        return 0
    device = device_traits(weights[0].qweight.device)[0]
    choices = read_cache(device)

    def keep(key: str, config: Config) -> None:
        choices[key] = config
        write_cache(device, choices)

    try:
        return len(
            tune(
                weights,
                dtype,
                max_rows,
                minutes=minutes,
                known=tuned(device).keys(),
                keep=keep,
                measure=measure,
                progress=progress,
            )
        )
    except (torch.OutOfMemoryError, OSError) as error:
        logger.warning("tuning ends early, the rule's configurations stay: %s", error)
        return 0


def random_weights(columns: int, out: int, device: torch.device) -> Iterator[PackedWeight]:
    """A weight of each common kind: affine in groups of 128 and 32, a codebook in groups of 64."""
    for group, zeros, codebook in ((128, False, False), (32, True, False), (64, False, True)):
        shape = (out, columns // group)
        levels = torch.linspace(-1, 1, 16) if codebook else SYMMETRIC_LEVELS
        yield PackedWeight(
            qweight=torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=device),
            scales=torch.rand(shape, device=device).half(),
            zeros=torch.full(shape, 8.0, device=device).half() if zeros else None,
            levels=(INTEGER_LEVELS if zeros else levels).to(device),
            out_features=out,
            in_features=columns,
            group_size=group,
        ).to_layout("gpu_tiles")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=SHAPES, help="inputs×outputs, comma-separated")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop beginning searches then")
    parser.add_argument("--rows", type=int, default=2048, help="largest batch to tune for")
    parser.add_argument("--ship", action="store_true", help="write the repository's table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU to tune for", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    name = torch.cuda.get_device_name()
    path = SHIPPED if arguments.ship else cache_path(name)
    deadline = time.monotonic() + 60 * arguments.minutes
    for shape in arguments.shapes.split(","):
        columns, out = (int(number) for number in shape.lower().split("x"))
        left = (deadline - time.monotonic()) / 60
        if left <= 0:
            print(f"out of time: {shape} and later shapes keep the rule's choice")
            break
        weights = random_weights(columns, out, device)
        best = tune(weights, torch.bfloat16, arguments.rows, minutes=left)
        write(path, name, best)  # after each shape, so that an interruption loses little
        for key, config in best.items():
            print(f"{key}: {config}")
    print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
