"""Products with packed weights by whichever kernel takes them, for callers other than the decoder.

The decoder binds each weight to its kernel once (:mod:`nybble.kernels.backend`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.backend import backend_for
from nybble.kernels.cpu.library import library
from nybble.kernels.layout import Layout
from nybble.kernels.packed import PackedWeight


def preferred_layout(device: torch.device) -> Layout:
    """The layout the fastest kernel on ``device`` reads."""
    if device.type == "cuda":
        return "gpu_tiles"
    return "cpu_tiles" if device.type == "cpu" and library() is not None else "rows"


def gated_layout(weight: PackedWeight, device: torch.device) -> Layout:
    """:func:`preferred_layout` for a fused gate_up_proj."""
    size = weight.group_size
    from_tiles = weight.groups == 1 or size % 32 == 0 or size == 16
    if device.type == "cuda" and from_tiles and weight.out_features % 16 == 0:
        return "gpu_gated_tiles"
    return preferred_layout(device)


def packed_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x @ weight.dequantize().T + bias``: ``(..., in_features)`` to ``(..., out_features)``."""
    return backend_for(x.device, x.dtype).linear(weight, x.dtype)(x)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """:meth:`PackedWeight.dequantize` by the CPU kernel if it takes the weight."""
    if weight.qweight.is_cpu:
        cpu = library()
        if cpu is not None and cpu.takes(weight):
            return cpu.dequantize(weight, dtype)
    return weight.dequantize(dtype)
