"""Compiles every matmul a set of weights will need before the first request."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from nybble.kernels.activation import Activation
from nybble.kernels.packed import PackedWeight
from nybble.kernels.progress import Progress, track
from nybble.kernels.triton.configs import BUCKETS
from nybble.kernels.triton.dequantize import stored_columns
from nybble.kernels.triton.matmul import packed_matmul, takes

logger = logging.getLogger(__name__)


def signature(weight: PackedWeight) -> tuple[object, ...]:
    """What two weights must share to run the same machine code for every number of rows."""
    return (
        weight.layout,
        weight.out_features,
        stored_columns(weight),
        weight.groups,
        weight.group_size,
        weight.scales.dtype,
        weight.code_kind,
        weight.zeros is not None,
        None if weight.bias is None else weight.bias.dtype,
    )


def warmup(
    weights: Iterable[PackedWeight],
    dtype: torch.dtype,
    max_rows: int,
    activation: Activation,
    *,
    progress: Progress = True,
) -> int:
    """Run every matmul of ``weights`` once for each bucket up to ``max_rows`` rows of ``dtype``.

    Compiles, sets up the counters CUDA graphs need, and reads each weight's levels, so that nothing
    later waits for the device. activation: the one fused into gated weights if no adapter is used.
    Returns how many sizes of product there are.
    """
    distinct = {}
    slow: set[int] = set()
    for weight in weights:
        assert weight.code_kind  # reads the levels of every weight
        if takes(weight, dtype):
            distinct[signature(weight)] = weight
        elif weight.group_size not in slow:
            slow.add(weight.group_size)
            logger.warning(
                "weights in groups of %d have no GPU kernel: they are dequantized at every call",
                weight.group_size,
            )
    largest = next((b for b in BUCKETS if b >= max_rows), BUCKETS[-1])
    work = [(w, rows) for w in distinct.values() for rows in BUCKETS if rows <= largest]
    for weight, rows in track(work, "Compiling matmuls", progress):
        x = torch.zeros(rows, weight.in_features, dtype=dtype, device=weight.qweight.device)
        packed_matmul(x, weight)
        if weight.layout == "gpu_gated_tiles":
            packed_matmul(x, weight, activation=activation)
    return len(work)
