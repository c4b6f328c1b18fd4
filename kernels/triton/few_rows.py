"""The 4-bit matmul for a few rows: a block's warps share its columns, and no two blocks do.

If there are few outputs for each multiprocessor, full bandwidth needs several warps to work on the
columns at once. Here each warp of a block takes every PARTS-th step of the same outputs, as one
entry of a batched product, and the block adds its warps' sums at the end, in order. Nothing is
left for another block to add, so there is no workspace, no counter, and no wait at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.activation import Activation
from nybble.kernels.packed import PackedWeight
from nybble.kernels.triton.configs import Config
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.step import (
    SLICE,
    STEP,
    TILE_N,
    add_scaled_products,
    fetch,
    group_constants,
    of_slices,
    rows_of_slices,
    shifted,
    store_outputs,
    unpacked,
)
from nybble.kernels.triton.unpack import INTERPRETED, codebook_table


@triton.jit(do_not_specialize=["rows", "groups"])
def few_rows_kernel(
    x,  # (rows, columns)
    qweight,  # int16 (out / 64, columns / 128, 64, 32)
    scales,  # (out / 64, groups, 64)
    zeros,
    levels,
    bias,
    out,  # (rows, out_features)
    rows,
    out_features,
    columns,
    groups,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    OVERLAP: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    CENTRE: tl.constexpr = 8 if CODES == "integer" else 0
    steps = tl.cdiv(columns, STEP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, SLICE)
    part = tl.arange(0, PARTS)
    q_row = n // TILE_N * steps * TILE_N + n % TILE_N
    q_at = q_row[None, :, None] * SLICE + k[None, None, :]
    q_at = qweight + q_at + part[:, None, None] * (TILE_N * SLICE)
    x_at = m[None, None, :] * columns + k[None, :, None]
    x_at = x + x_at + part[:, None, None] * STEP
    scale_at = (n // TILE_N * groups * TILE_N + n % TILE_N)[None, :]
    valid_m = m[None, None, :] < rows
    if OVERLAP and not INTERPRETED:
        # Weights do not depend on the kernel before: fetch the first ones while it finishes.
        # Everything else is accessed only after it.
        row_at = (qweight + q_row * SLICE)[None, :]
        for soon in tl.static_range(2):
            begin = tl.minimum(soon * PARTS + part, steps - 1)
            fetch(row_at + begin[:, None] * (TILE_N * SLICE))
        tl.extra.cuda.gdc_wait()
    table = codebook_table(levels, dtype) if CODES == "codebook" and not INTERPRETED else 0
    acc = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    ahead = of_slices(scales + scale_at, part[:, None], SETS, GROUP, groups)
    for first in range(0, steps, PARTS):
        live = first + part[:, None, None] < steps
        valid = valid_m & live
        q = tl.load(q_at + first * (TILE_N * SLICE), mask=live, other=0)
        left = columns - (first + part[:, None, None]) * STEP - k[None, :, None]
        xs = rows_of_slices(x_at + first * STEP, valid, left, WHOLE_STEPS)
        step = first + part[:, None]
        now = ahead
        ahead = of_slices(scales + scale_at, step + PARTS, SETS, GROUP, groups)
        z0, z1, z2, z3 = 0.0, 0.0, 0.0, 0.0
        if HAS_ZEROS:
            z0, z1, z2, z3 = of_slices(zeros + scale_at, step, SETS, GROUP, groups)
        w0, w1, w2, w3 = unpacked(q, levels, table, dtype, CODES)
        w0 = shifted(w0, z0, HAS_ZEROS, CENTRE)
        w1 = shifted(w1, z1, HAS_ZEROS, CENTRE)
        w2 = shifted(w2, z2, HAS_ZEROS, CENTRE)
        w3 = shifted(w3, z3, HAS_ZEROS, CENTRE)
        acc = add_scaled_products(acc, (w0, w1, w2, w3), xs, now, SETS)

    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(acc, axis=0)
    store_outputs(
        y,
        bias,
        out,
        tl.program_id(0) * BLOCK_N,
        m,
        rows,
        out_features,
        dtype,
        HAS_BIAS,
        GATED,
        ACTIVATION,
    )


def few_rows_matmul(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    config: Config,
    overlap: bool,
    activation: Activation | None,
) -> None:
    """``x (rows, stored columns)``, contiguous, times the weight, into ``out``: see matmul.py."""
    rows, columns = x.shape
    blocks = triton.cdiv(weight.out_features, config.block_n), triton.cdiv(rows, config.block_m)
    few_rows_kernel[blocks](
        x,
        weight.qweight.view(torch.int16),
        weight.scales,
        weight.zeros,
        weight.levels,
        weight.bias,
        out,
        rows,
        weight.out_features,
        columns,
        weight.groups,
        CODES=weight.code_kind,
        HAS_ZEROS=weight.zeros is not None,
        HAS_BIAS=weight.bias is not None,
        GATED=weight.layout == "gpu_gated_tiles",
        ACTIVATION=activation,
        **group_constants(weight),
        OVERLAP=overlap,
        WHOLE_STEPS=columns % 128 == 0,
        PARTS=config.parts,
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        num_warps=config.parts,
        num_stages=config.num_stages,
        **({"launch_pdl": True} if overlap else {}),
        **FUSED,
    )
