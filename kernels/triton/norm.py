"""RMSNorm with an optional residual: one read and one write.

kernels/reference.py defines the result, including its roundings.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.overlap import follow, overlap_options

# Elements of one program; narrow rows (the heads of a QK norm) share one.
_TILE = 2048


@triton.jit(do_not_specialize=["rows", "heads"])
def rms_norm_kernel(
    x,  # heads × width elements at each multiple of ``stride``
    residual,  # this and the rest: (rows, width)
    weight,
    out,
    total,
    rows,
    width,
    heads,
    stride,
    eps,
    OFFSET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    x_at = (row // heads).to(tl.int64) * stride + row % heads * width
    value = tl.load(x + x_at[:, None] + column[None, :], mask, 0.0)
    if HAS_RESIDUAL:
        value = (value.to(tl.float32) + tl.load(residual + at, mask, 0.0).to(tl.float32)).to(
            value.dtype
        )
        tl.store(total + at, value, mask)
    wide = value.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / width + eps)
    normed = wide * inverse[:, None]
    scale = tl.load(weight + column, column < width, 0.0).to(tl.float32)
    if OFFSET is None:
        normed = normed.to(value.dtype).to(tl.float32)
    else:
        scale += OFFSET
    tl.store(out + at, (normed * scale[None, :]).to(value.dtype), mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float | None = None) -> Tensor:
    """See :func:`nybble.kernels.reference.rms_norm`; float16, bfloat16 or float32.

    Heads ``(tokens, heads, head_dim)`` within wider rows are read where they are.
    """
    if x.ndim != 3 or x.stride()[1:] != (x.shape[2], 1):
        x = x.contiguous()
    return _launch(x, None, weight, eps, offset)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`nybble.kernels.reference.add_rms_norm`."""
    return _launch(x.contiguous(), residual.contiguous(), weight, eps, offset)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float | None
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.numel() // width
    heads, stride = (x.shape[1], x.stride(0)) if x.ndim == 3 else (1, width)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(x)
    wide = triton.next_power_of_2(width)
    per_program = max(1, _TILE // wide)
    rms_norm_kernel[(triton.cdiv(rows, per_program),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        total,
        rows,
        width,
        heads,
        stride,
        eps,
        OFFSET=offset,
        HAS_RESIDUAL=residual is not None,
        ROWS=per_program,
        WIDTH=wide,
        num_warps=max(4, min(16, wide * per_program // 512)),
        **overlap_options(x.device),
        **FUSED,
    )
    return out, total
