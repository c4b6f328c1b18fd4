"""Packed weights to 16 bits on the GPU, for products so large that the vendor's library is faster.

From a few thousand rows up the product is bound by arithmetic, and writing the weight out once
costs little beside it: 37 µs of a 1 ms product for 4096 × 11008 and 8192 rows on an H100, from
bytes over bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.activation import Activation
from nybble.kernels.packed import PackedWeight
from nybble.kernels.triton.activation import gated
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.step import output_of, unpacked, wide
from nybble.kernels.triton.unpack import INTERPRETED, codebook_table

# Bytes of the 16-bit weight that exist at a time. Gate and up of 7B and 13B models take up to 270
# MiB; if they were cut in two, outputs would be copied.
WORKSPACE = 288 << 20


@triton.jit
def _store_slice(
    w,
    at,
    first,
    out_row,
    scales,
    zeros,
    columns,
    groups,
    valid,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """Scale one slice in float32, round it once, and store its columns from ``first``."""
    column = first + tl.arange(0, 32)[None, :]
    if GROUP == 16:
        place = at[:, None] + tl.minimum(column // GROUP, groups - 1) * 64
    else:
        place = at[:, None] + (0 if GROUP == 0 else tl.minimum(first // GROUP, groups - 1)) * 64
    value = w.to(tl.float32)
    if HAS_ZEROS:
        value += CENTRE - tl.load(zeros + place).to(tl.float32)
    value *= wide(tl.load(scales + place))
    mask = valid[:, None] & (column < columns)
    tl.store(out_row[:, None] + column, value.to(w.dtype), mask=mask)


@triton.jit(do_not_specialize=["out_features"])
def dequantize_kernel(
    qweight,  # int16 (out / 64, columns / 128, 64, 32)
    scales,  # (out / 64, groups, 64)
    zeros,
    levels,
    out,  # (out_features, columns)
    out_features,
    columns,
    groups,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    CENTRE: tl.constexpr = 8 if CODES == "integer" else 0
    step = tl.program_id(0)
    tile = tl.program_id(1)
    steps = tl.cdiv(columns, 128)
    row = tl.arange(0, 64)
    words = (tile * steps + step) * 2048 + row[:, None] * 32 + tl.arange(0, 32)[None, :]
    q = tl.load(qweight + words)
    table = codebook_table(levels, dtype) if CODES == "codebook" and not INTERPRETED else 0
    w0, w1, w2, w3 = unpacked(q, levels, table, dtype, CODES)
    n = tile * 64 + row
    valid = n < out_features
    out_row = out + output_of(n, out_features, GATED).to(tl.int64) * columns
    at = tile * groups * 64 + row
    first = step * 128
    _store_slice(
        w0, at, first, out_row, scales, zeros, columns, groups, valid, GROUP, HAS_ZEROS, CENTRE
    )
    _store_slice(
        w1, at, first + 32, out_row, scales, zeros, columns, groups, valid, GROUP, HAS_ZEROS, CENTRE
    )
    _store_slice(
        w2, at, first + 64, out_row, scales, zeros, columns, groups, valid, GROUP, HAS_ZEROS, CENTRE
    )
    _store_slice(
        w3, at, first + 96, out_row, scales, zeros, columns, groups, valid, GROUP, HAS_ZEROS, CENTRE
    )


def stored_columns(weight: PackedWeight) -> int:
    """Columns of codes: as many as inputs, or as entries of ``perm``."""
    return weight.in_features if weight.perm is None else len(weight.perm)


def dequantize(
    weight: PackedWeight, dtype: torch.dtype, start: int = 0, stop: int | None = None
) -> Tensor:
    """Outputs ``start``…``stop``−1 as ``(stop − start, stored columns)``, columns in stored order.

    ``start`` is a multiple of 64. Levels of a codebook are rounded to ``dtype`` before they are
    scaled, as in the matmul. In ``gpu_gated_tiles``, ``start`` and ``stop`` count outputs as
    stored, and the result has the gate outputs first, then the up outputs.
    """
    stop = weight.out_features if stop is None else min(stop, weight.out_features)
    columns = stored_columns(weight)
    out = torch.empty(stop - start, columns, dtype=dtype, device=weight.qweight.device)
    tiles = slice(start // 64, -(-stop // 64))
    qweight = weight.qweight[tiles].view(torch.int16)
    dequantize_kernel[(qweight.shape[1], qweight.shape[0])](
        qweight,
        weight.scales[tiles],
        None if weight.zeros is None else weight.zeros[tiles],
        weight.levels,
        out,
        stop - start,
        columns,
        weight.groups,
        CODES=weight.code_kind,
        HAS_ZEROS=weight.zeros is not None,
        GROUP=0 if weight.groups == 1 else weight.group_size,
        GATED=weight.layout == "gpu_gated_tiles",
        num_warps=4,
        **FUSED,
    )
    return out


def outputs_at_a_time(columns: int, workspace: int = WORKSPACE) -> int:
    """How many outputs of so many columns take ``workspace`` bytes in 16 bits, a multiple of 64."""
    return max(64, workspace // (2 * columns) // 64 * 64)


def dense_matmul(
    x: Tensor,
    weight: PackedWeight,
    workspace: int = WORKSPACE,
    activation: Activation | None = None,
) -> Tensor:
    """``x (rows, stored columns)`` times the weight, ``workspace`` bytes of it at a time.

    activation: of a weight in ``gpu_gated_tiles``; then ``activation(gate) · up``. Each part of the
    weight has gates and what they are multiplied with, so that the whole product never exists.
    """
    each = outputs_at_a_time(x.shape[1], workspace)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    if each >= weight.out_features:
        product = torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
        return product if activation is None else gated(product, activation)
    halves = 2 if weight.layout == "gpu_gated_tiles" else 1
    width = weight.out_features // (1 if activation is None else halves)
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    for start in range(0, weight.out_features, each):
        stop = min(start + each, weight.out_features)
        part = slice(start // halves, stop // halves)
        dense = dequantize(weight, x.dtype, start, stop)
        own = None if bias is None else bias.view(halves, -1)[:, part].flatten()
        product = torch.nn.functional.linear(x, dense, own)
        if activation is None:
            out.view(len(x), halves, -1)[:, :, part] = product.view(len(x), halves, -1)
        else:
            gated(product, activation, out[:, part])
    return out
