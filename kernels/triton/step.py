"""What one step of 128 columns is made of: scales and zeros of its slices, and its products.

Tiles are ``(BLOCK_N, 32)``, or ``(parts, BLOCK_N, 32)`` where a block takes several steps at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from nybble.kernels.packed import PackedWeight
from nybble.kernels.triton.unpack import INTERPRETED

SLICE = tl.constexpr(32)
STEP = tl.constexpr(128)
TILE_N = tl.constexpr(64)


def group_constants(weight: PackedWeight) -> dict[str, int]:
    """GROUP, 0 where a row has one group, and SETS, how many scales a step can meet: 1, 2 or 4."""
    if weight.groups == 1:
        return {"GROUP": 0, "SETS": 1}
    size = weight.group_size
    return {"GROUP": size, "SETS": 1 if size % 128 == 0 else 2 if size == 64 else 4}


@triton.jit
def group_of(step, part: tl.constexpr, SETS: tl.constexpr, GROUP: tl.constexpr, groups):
    """The group of part ``part`` of SETS of step ``step``. GROUP 0 is one group for all columns."""
    if GROUP == 0:
        group = 0
    else:
        group = tl.minimum((step * STEP + part * (STEP // SETS)) // GROUP, groups - 1)
    return group


@triton.jit
def of_slices(values, step, SETS: tl.constexpr, GROUP: tl.constexpr, groups):
    """Scale or zero of each of a step's four slices; slice i is in part ``i · SETS / 4``."""
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
def by_row(values):
    """One value for each row of a tile, to be broadcast along it."""
    return tl.expand_dims(values, -1)


@triton.jit
def times_plus(w, factor, addend, HAS_ADDEND: tl.constexpr):
    """``w · factor + addend`` by row, in the dtype of ``w``: the interpreter has no bfloat16."""
    dtype: tl.constexpr = w.dtype
    if INTERPRETED:
        wide = w.to(tl.float32) * by_row(factor.to(dtype).to(tl.float32))
        if HAS_ADDEND:
            wide += by_row(addend.to(dtype).to(tl.float32))
        w = wide.to(dtype)
    else:
        w = w * by_row(factor.to(dtype))
        if HAS_ADDEND:
            w = w + by_row(addend.to(dtype))
    return w


@triton.jit
def scaled(w, scale, zero, HAS_ZEROS: tl.constexpr, CENTRE: tl.constexpr):
    """``(w + CENTRE − zero) · scale``, for an operand of ``code − CENTRE``."""
    s = scale.to(tl.float32)
    return times_plus(w, s, (CENTRE - zero.to(tl.float32)) * s if HAS_ZEROS else s, HAS_ZEROS)


@triton.jit
def shifted(w, zero, HAS_ZEROS: tl.constexpr, CENTRE: tl.constexpr):
    """``w + CENTRE − zero``: exact where zero is an integer."""
    if HAS_ZEROS:
        addend = by_row((CENTRE - zero.to(tl.float32)).to(w.dtype))
        w = (w.to(tl.float32) + addend.to(tl.float32)).to(w.dtype) if INTERPRETED else w + addend
    return w


@triton.jit
def product(w, x, acc):
    """``acc + w @ x``, summed in float32."""
    return tl.dot(w.to(tl.float32), x.to(tl.float32), acc) if INTERPRETED else tl.dot(w, x, acc)


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
