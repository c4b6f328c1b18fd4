"""The parts of one matmul step of 128 columns: its slices' scales and zeros, its products.

Tiles are ``(BLOCK_N, 32)``, or ``(parts, BLOCK_N, 32)`` if a block takes several steps at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels.packed import PackedWeight
from nybble.kernels.triton.activation import times_up
from nybble.kernels.triton.unpack import (
    INTERPRETED,
    unpack_affine,
    unpack_codebook,
    unpack_e2m1,
)

SLICE = tl.constexpr(32)
STEP = tl.constexpr(128)
TILE_N = tl.constexpr(64)


def group_constants(weight: PackedWeight) -> dict[str, int]:
    """GROUP, 0 if a row has one group, and SETS, how many scales a step can meet: 1, 2, 4 or 8."""
    if weight.groups == 1:
        return {"GROUP": 0, "SETS": 1}
    size = weight.group_size
    return {"GROUP": size, "SETS": {16: 8, 64: 2}.get(size, 1 if size % 128 == 0 else 4)}


@triton.jit
def group_of(step, part: tl.constexpr, SETS: tl.constexpr, GROUP: tl.constexpr, groups):
    """The group of part ``part`` of SETS of step ``step``. GROUP 0 is one group for all columns."""
    if GROUP == 0:
        group = 0
    elif GROUP % 128 == 0:
        group = tl.minimum(step // (GROUP // 128), groups - 1)
    elif 128 % GROUP == 0:
        group = tl.minimum(step * (128 // GROUP) + part * (128 // SETS) // GROUP, groups - 1)
    else:
        group = tl.minimum((step * STEP + part * (STEP // SETS)) // GROUP, groups - 1)
    return group


@triton.jit
def of_halves(values, step, slice: tl.constexpr, GROUP: tl.constexpr, groups):
    """Scale or zero of each element of a slice that has two groups of 16 columns."""
    first = tl.load(values + group_of(step, 2 * slice, 8, GROUP, groups) * TILE_N)
    second = tl.load(values + group_of(step, 2 * slice + 1, 8, GROUP, groups) * TILE_N)
    in_first = tl.arange(0, SLICE) < SLICE // 2
    return tl.where(in_first[None, :], tl.expand_dims(first, -1), tl.expand_dims(second, -1))


@triton.jit
def of_slices(values, step, SETS: tl.constexpr, GROUP: tl.constexpr, groups):
    """Scale or zero of each of a step's four slices; slice i is in part ``i · SETS / 4``.

    One for each row of a slice; in groups of 16, one for each element.
    """
    if SETS == 8:
        v0 = of_halves(values, step, 0, GROUP, groups)
        v1 = of_halves(values, step, 1, GROUP, groups)
        v2 = of_halves(values, step, 2, GROUP, groups)
        v3 = of_halves(values, step, 3, GROUP, groups)
    else:
        v0 = tl.load(values + group_of(step, 0, SETS, GROUP, groups) * TILE_N)
        v1, v2, v3 = v0, v0, v0
        if SETS == 2:
            v2 = tl.load(values + group_of(step, 1, SETS, GROUP, groups) * TILE_N)
            v3 = v2
        if SETS == 4:
            v1 = tl.load(values + group_of(step, 1, SETS, GROUP, groups) * TILE_N)
            v2 = tl.load(values + group_of(step, 2, SETS, GROUP, groups) * TILE_N)
            v3 = tl.load(values + group_of(step, 3, SETS, GROUP, groups) * TILE_N)
    return v0, v1, v2, v3


@triton.jit
def wide(values):
    """Scales or zeros in float32. Bytes are exponents (:func:`nybble.kernels.packed.e8m0`)."""
    if values.dtype == tl.uint8:
        # An exponent is in its place 23 bits up, but for that of 2 ** −127, which is subnormal.
        bits = tl.maximum(values.to(tl.int32) << 23, 1 << 22)
        values = bits.to(tl.float32, bitcast=True)
    else:
        values = values.to(tl.float32)
    return values


@triton.jit
def by_row(values):
    """One value for each row of a tile, to be broadcast along it."""
    return tl.expand_dims(values, -1)


@triton.jit
def along(values, w):
    """``values`` of the rows of ``w``, or of its elements, to be combined with it."""
    if len(values.shape) < len(w.shape):
        values = by_row(values)
    return values


@triton.jit
def times_plus(w, factor, addend, HAS_ADDEND: tl.constexpr):
    """``w · factor + addend``, by row or element, in the dtype of ``w``.

    The interpreter has no bfloat16.
    """
    dtype: tl.constexpr = w.dtype
    if INTERPRETED:
        wide = w.to(tl.float32) * along(factor.to(dtype).to(tl.float32), w)
        if HAS_ADDEND:
            wide += along(addend.to(dtype).to(tl.float32), w)
        w = wide.to(dtype)
    else:
        w = w * along(factor.to(dtype), w)
        if HAS_ADDEND:
            w = w + along(addend.to(dtype), w)
    return w


@triton.jit
def scaled(w, scale, zero, HAS_ZEROS: tl.constexpr, CENTRE: tl.constexpr):
    """``(w + CENTRE − zero) · scale``, for an operand of ``code − CENTRE``."""
    s = wide(scale)
    return times_plus(w, s, (CENTRE - zero.to(tl.float32)) * s if HAS_ZEROS else s, HAS_ZEROS)


@triton.jit
def shifted(w, zero, HAS_ZEROS: tl.constexpr, CENTRE: tl.constexpr):
    """``w + CENTRE − zero``: exact if zero is an integer."""
    if HAS_ZEROS:
        addend = by_row((CENTRE - zero.to(tl.float32)).to(w.dtype))
        w = (w.to(tl.float32) + addend.to(tl.float32)).to(w.dtype) if INTERPRETED else w + addend
    return w


@triton.jit
def unpacked(q, levels, table, dtype: tl.constexpr, CODES: tl.constexpr):
    """The four slices of a tile of words: levels, or codes minus 8."""
    if CODES == "codebook":
        w0, w1, w2, w3 = unpack_codebook(q, levels, table, dtype)
    elif CODES == "e2m1":
        w0, w1, w2, w3 = unpack_e2m1(q, levels, dtype)
    else:
        w0, w1, w2, w3 = unpack_affine(q, dtype)
    return w0, w1, w2, w3


@triton.jit
def rows_of_slices(x_at, valid, left, WHOLE_STEPS: tl.constexpr):
    """Four slices of ``x``; ``left`` columns remain from each one of the first slice on."""
    if WHOLE_STEPS:
        x0 = tl.load(x_at, mask=valid, other=0.0)
        x1 = tl.load(x_at + SLICE, mask=valid, other=0.0)
        x2 = tl.load(x_at + 2 * SLICE, mask=valid, other=0.0)
        x3 = tl.load(x_at + 3 * SLICE, mask=valid, other=0.0)
    else:
        x0 = tl.load(x_at, mask=valid & (left > 0), other=0.0)
        x1 = tl.load(x_at + 32, mask=valid & (left > 32), other=0.0)
        x2 = tl.load(x_at + 64, mask=valid & (left > 64), other=0.0)
        x3 = tl.load(x_at + 96, mask=valid & (left > 96), other=0.0)
    return x0, x1, x2, x3


@triton.jit
def side_by_side(w):
    """Four slices ``(rows, 32)`` as one operand ``(rows, 128)``: no element changes its lane."""
    w0, w1, w2, w3 = w
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return joined.permute(0, 2, 3, 1).reshape(w0.shape[0], 128)


@triton.jit
def product(w, x, acc):
    """``acc + w @ x``, summed in float32."""
    return tl.dot(w.to(tl.float32), x.to(tl.float32), acc) if INTERPRETED else tl.dot(w, x, acc)


@triton.jit
def add_scaled_products(acc, w, x, scales, SETS: tl.constexpr):
    """``acc`` plus a step's products, each group's sum scaled in float32."""
    w0, w1, w2, w3 = w
    x0, x1, x2, x3 = x
    s0, s1, s2, s3 = scales
    nothing = tl.zeros(acc.shape, tl.float32)
    part = product(w0, x0, nothing)
    if SETS == 4:
        acc += by_row(wide(s0)) * part
        part = product(w1, x1, nothing)
        acc += by_row(wide(s1)) * part
        part = product(w2, x2, nothing)
        acc += by_row(wide(s2)) * part
        part = product(w3, x3, nothing)
    elif SETS == 2:
        part = product(w1, x1, part)
        acc += by_row(wide(s0)) * part
        part = product(w2, x2, nothing)
        part = product(w3, x3, part)
    else:
        part = product(w1, x1, part)
        part = product(w2, x2, part)
        part = product(w3, x3, part)
    return acc + by_row(wide(s3)) * part


@triton.jit
def output_of(n, out_features, GATED: tl.constexpr):
    """The output that stored row ``n`` computes."""
    if GATED:
        n = n // 16 * 8 + n % 8 + tl.where(n % 16 < 8, 0, out_features // 2)
    return n


@triton.jit
def store_outputs(
    y,
    bias,
    out,
    first,
    m,
    rows,
    out_features,
    dtype: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add the bias to ``y``, stored outputs from ``first`` on × rows ``m``; store it.

    With an ACTIVATION, gate and up outputs are combined by :func:`times_up`.
    """
    BLOCK_N: tl.constexpr = y.shape[0]
    BLOCK_M: tl.constexpr = y.shape[1]
    n = first + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        at = output_of(n, out_features, GATED)
        y += tl.load(bias + at, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
    y = y.to(dtype)
    if ACTIVATION is not None:
        half = out_features // 2
        gate, up = tl.split(y.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
        at = first // 2 + tl.arange(0, BLOCK_N // 2)
        inside = (m[None, :] < rows) & (at[:, None] < half)
        value = times_up(gate, up, ACTIVATION).reshape(BLOCK_N // 2, BLOCK_M)
        tl.store(out + m[None, :] * half + at[:, None], value, mask=inside)
    else:
        at = output_of(n, out_features, GATED)
        inside = (m[None, :] < rows) & (n[:, None] < out_features)
        tl.store(out + m[None, :] * out_features + at[:, None], y, mask=inside)


@triton.jit
def fetch(pointers):
    """Bring what ``pointers`` point at into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
