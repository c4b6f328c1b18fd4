"""Linear layers, packed or not: picks the kernel for the device, layout and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.activation import Activation
from nybble.kernels.cpu.library import library
from nybble.kernels.layout import Layout
from nybble.kernels.ops import gated
from nybble.kernels.packed import DenseWeight, PackedWeight

# Rows dequantized at a time if no packed kernel applies: 16 MiB of float32 at 4096 columns.
_ROWS_AT_A_TIME = 1024


def preferred_layout(device: torch.device) -> Layout:
    """The layout the fastest kernel on ``device`` reads."""
    if device.type == "cuda":
        return "gpu_tiles"
    return "cpu_tiles" if device.type == "cpu" and library() is not None else "rows"


def gated_layout(weight: PackedWeight, device: torch.device) -> Layout:
    """:func:`preferred_layout` for a fused gate_up_proj."""
    from_tiles = weight.groups == 1 or weight.group_size % 32 == 0
    if device.type == "cuda" and from_tiles and weight.out_features % 16 == 0:
        return "gpu_gated_tiles"
    return preferred_layout(device)


def linear(x: Tensor, weight: PackedWeight | DenseWeight) -> Tensor:
    """``x @ W.T + bias`` for ``x (..., in_features)``, in the dtype of ``x``."""
    if isinstance(weight, PackedWeight):
        return packed_matmul(x, weight)
    if x.is_cpu and x.dtype == torch.bfloat16:
        return _linear_of_few_sizes(x, weight)
    return torch.nn.functional.linear(x, weight.weight, weight.bias)


def _linear_of_few_sizes(x: Tensor, weight: DenseWeight) -> Tensor:
    """Linear layer with the rows padded by zeros to :func:`rows_computed`.

    For every new number of rows and weight shape oneDNN compiles a kernel, which takes milliseconds
    and more than half a MiB that it keeps. Padding lets only a few numbers of rows occur.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if (added := rows_computed(count) - count) > 0:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, added))
    out = torch.nn.functional.linear(rows, weight.weight, weight.bias)[:count]
    return out.reshape(*x.shape[:-1], weight.weight.shape[0])


def rows_computed(rows: int) -> int:
    """The next power of two or three quarters of one, two at least; multiples of 64 above 128.

    PyTorch multiplies a single row in another way, which sums in another order: a row alone would
    differ in its last bits from the same row in a batch.
    """
    if rows == 1:
        return 2
    if rows > 128:
        return -(-rows // 64) * 64
    power = 1 << max(0, rows - 1).bit_length()
    return 3 * power // 4 if rows <= 3 * power // 4 else power


def gated_linear(x: Tensor, weight: PackedWeight | DenseWeight, activation: Activation) -> Tensor:
    """``activation(gate) · up`` of ``linear(x, weight)``'s halves: ``(..., out_features / 2)``."""
    if (
        isinstance(weight, PackedWeight)
        and weight.layout == "gpu_gated_tiles"
        and x.device.type == "cuda"
    ):
        from nybble.kernels.triton import matmul as gpu

        if gpu.takes(weight, x.dtype):
            return gpu.packed_matmul(x, weight, activation=activation)
    return gated(linear(x, weight), activation)


def packed_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x @ weight.dequantize().T + bias``: ``(..., in_features)`` to ``(..., out_features)``."""
    if x.is_cpu and x.dtype == torch.bfloat16:
        cpu = library()
        if cpu is not None and cpu.takes(weight):
            return cpu.packed_matmul(x, weight)
    if x.is_cuda:
        from nybble.kernels.triton import (
            matmul as gpu,
        )  # imported here: Triton exists for Linux only

        if gpu.takes(weight, x.dtype):
            return gpu.packed_matmul(x, weight)
    return _dequantized_by_rows(x, weight)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """:meth:`PackedWeight.dequantize` by the CPU kernel if it takes the weight."""
    if weight.qweight.is_cpu:
        cpu = library()
        if cpu is not None and cpu.takes(weight):
            return cpu.dequantize(weight, dtype)
    return weight.dequantize(dtype)


def _dequantized_by_rows(x: Tensor, weight: PackedWeight) -> Tensor:
    """A few output rows at a time, so that no full-precision copy of the weight ever exists."""
    wide = x.float()
    parts = [
        wide @ dequantize(weight.rows(start, start + _ROWS_AT_A_TIME), torch.float32).T
        for start in range(0, weight.out_features, _ROWS_AT_A_TIME)
    ]
    out = torch.cat(parts, dim=-1)
    if weight.bias is not None:
        out += weight.bias.float()
    return out.to(x.dtype)
