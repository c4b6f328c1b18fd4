"""The 4-bit matmul of experts for a few rows: a block's warps share the columns of its expert.

A step of up to 8 rows gives an expert at most 8, so that a block has all of them, and each expert
that is used is read once. Each warp takes every PARTS-th step of the same outputs, as one entry of
a batched product (:mod:`nybble.kernels.triton.few_rows`), and the block adds its warps' sums at the
end, in order: the columns are split without a workspace, and a few experts keep the memory busy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels.triton.step import (
    SLICE,
    STEP,
    TILE_N,
    add_scaled_products,
    of_slices,
    output_of,
    rows_of_slices,
    shifted,
    store_outputs,
    unpacked,
)
from nybble.kernels.triton.unpack import INTERPRETED, codebook_table

FEW_ROWS = 8
PARTS = 8
BLOCK_N = 32


@triton.jit(do_not_specialize=["places", "groups"])
def grouped_few_rows_kernel(
    x,  # (rows, columns), or (rows · top_k, columns) if X_PER_EXPERT
    matrices,  # int16 (experts, out / 64, columns / 128, 64, 32)
    scales,  # (experts, out / 64, groups, 64)
    zeros,
    levels,
    bias,  # (experts, out_features)
    weights,  # float32 (rows, top_k)
    out,  # (rows · top_k, out_features), float32 if WEIGHTED
    order,  # int32 (rows · top_k): places in (rows, top_k), sorted by expert
    expert_of,  # int32, of each block; −1 for one that is left over
    first_of,  # int32, where the rows of each block begin in `order`
    end_of,  # int32 (experts,), where the rows of each expert end in `order`
    places,  # rows · top_k
    out_features,
    columns,
    groups,
    TOP_K: tl.constexpr,
    X_PER_EXPERT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    CENTRE: tl.constexpr = 8 if CODES == "integer" else 0
    expert = tl.load(expert_of + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    steps = tl.cdiv(columns, STEP)
    tiles = tl.cdiv(out_features, TILE_N)
    matrices += expert * tiles * steps * (TILE_N * SLICE)
    scales += expert * tiles * groups * TILE_N
    if HAS_ZEROS:
        zeros += expert * tiles * groups * TILE_N
    if HAS_BIAS:
        bias += expert * out_features
    row = tl.load(first_of + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    valid = row < tl.load(end_of + expert)
    place = tl.load(order + row, mask=valid, other=0)
    x_row = place if X_PER_EXPERT else place // TOP_K

    first_n = tl.program_id(1) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, SLICE)
    part = tl.arange(0, PARTS)
    q_row = n // TILE_N * steps * TILE_N + n % TILE_N
    q_at = q_row[None, :, None] * SLICE + k[None, None, :]
    q_at = matrices + q_at + part[:, None, None] * (TILE_N * SLICE)
    x_at = x_row.to(tl.int64)[None, None, :] * columns + k[None, :, None]
    x_at = x + x_at + part[:, None, None] * STEP
    scale_at = (n // TILE_N * groups * TILE_N + n % TILE_N)[None, :]
    valid_m = valid[None, None, :]
    table = codebook_table(levels, dtype) if CODES == "codebook" and not INTERPRETED else 0
    acc = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    ahead = of_slices(scales + scale_at, part[:, None], SETS, GROUP, groups)
    for first in range(0, steps, PARTS):
        live = first + part[:, None, None] < steps
        q = tl.load(q_at + first * (TILE_N * SLICE), mask=live, other=0)
        left = columns - (first + part[:, None, None]) * STEP - k[None, :, None]
        xs = rows_of_slices(x_at + first * STEP, valid_m & live, left, WHOLE_STEPS)
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

    y = tl.sum(acc, axis=0)
    m = tl.where(valid, place, places)  # those beyond are not stored
    if WEIGHTED:
        if HAS_BIAS:
            at = output_of(n, out_features, GATED)
            y += tl.load(bias + at, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
        y *= tl.load(weights + place, mask=valid, other=0.0)[None, :]
        store_outputs(
            y, bias, out, first_n, m, places, out_features, tl.float32, False, GATED, None
        )
    else:
        store_outputs(y, bias, out, first_n, m, places, out_features, dtype, HAS_BIAS, GATED, None)
