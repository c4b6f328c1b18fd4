"""The activation of a gated MLP: one read and one write.

kernels/reference.py defines the result, including its roundings.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.activation import Activation, check_activation
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.overlap import follow, overlap_options

_TILE = 1024


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of float32 ``x``: its name is one of :data:`Activation`."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is 1 / (1 + e⁻²ᵘ), for u = √(2/π) · (x + 0.044715 · x³).
        y = x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    else:
        tl.static_assert(ACTIVATION == "relu2")
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = y * y
    return y


@triton.jit
def times_up(gate, up, ACTIVATION: tl.constexpr):
    """``activation(gate) · up``, rounded between the two as separate operations would."""
    activation = activated(gate.to(tl.float32), ACTIVATION).to(gate.dtype)
    return (activation.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def gated_kernel(
    gate_up,
    out,
    width,
    stride,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask, 0.0)
    up = tl.load(gate_up + row * 2 * width + width + column, mask, 0.0)
    tl.store(out + row * stride + column, times_up(gate, up, ACTIVATION), mask)


def gated(gate_up: Tensor, activation: Activation, out: Tensor | None = None) -> Tensor:
    """See :func:`nybble.kernels.reference.gated`. out: where to, some columns of a matrix."""
    check_activation(activation)
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    rows = gate_up.numel() // (2 * width)
    if out is None:
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
    stride = out.stride(0) if out.dim() == 2 else width
    gated_kernel[(rows, triton.cdiv(width, _TILE))](
        gate_up,
        out,
        width,
        stride,
        ACTIVATION=activation,
        TILE=_TILE,
        num_warps=4,
        **overlap_options(out.device),
        **FUSED,
    )
    return out
