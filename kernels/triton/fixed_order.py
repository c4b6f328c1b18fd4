"""Linear layers whose sums have one order, whatever the number of rows: ``x @ W.T + bias``.

The fast kernels (:mod:`nybble.kernels.triton.matmul`, and the vendor's library for 16-bit weights)
choose blocks and splits by the number of rows, and so round a row's sums otherwise in another
batch. Here every weight has one block shape, and its columns are cut into parts at places which the
weight and the device decide. A part is summed by itself, from zero, and the parts are added in
order. With few rows, a program computes one part, and the last to finish a block adds them; with
many, a program computes all parts of its block in turn. Both are the same sums of the same
products, by the same instructions.

A tensor core computes each element of a product alike, wherever in the block it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.activation import Activation, check_activation
from nybble.kernels.packed import DenseWeight, PackedWeight, Weight
from nybble.kernels.triton.configs import balanced_splits
from nybble.kernels.triton.device import FUSED, device_traits
from nybble.kernels.triton.matmul import arrivals, block_of, takes
from nybble.kernels.triton.step import (
    SLICE,
    TILE_N,
    group_constants,
    of_slices,
    product,
    rows_of_slices,
    scaled,
    side_by_side,
    store_outputs,
    unpacked,
)
from nybble.kernels.triton.unpack import INTERPRETED, codebook_table

# Columns of a 16-bit weight in a step: 128 of them would overfill Ada's shared memory.
DENSE_STEP = 64


@triton.jit(do_not_specialize=["rows", "groups", "parts", "steps_each"])
def fixed_order_kernel(
    x,  # (rows, columns)
    weight,  # int16 (out / 64, columns / 128, 64, 32), or x's dtype (out, columns) if DENSE
    scales,  # (out / 64, groups, 64)
    zeros,
    levels,
    bias,
    out,  # (rows, out_features)
    sums,  # float32, BLOCK_N × BLOCK_M for each block and part, if each has a program
    arrived,  # int32, zero, one for each block
    rows,
    out_features,
    columns,
    groups,
    parts,
    steps_each,
    DENSE: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    JOINED: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a step
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    CENTRE: tl.constexpr = 8 if CODES == "integer" else 0
    steps = tl.cdiv(columns, WIDTH)
    blocks_n, blocks_m = tl.cdiv(out_features, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    block_n, block_m = block_of(tl.program_id(0), blocks_n, blocks_m, 8)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # A product's columns: those of a whole step, or of its first slice.
    k = tl.arange(0, WIDTH if JOINED else 32)
    valid_m = m[None, :] < rows
    # Joined, rows past the last read the last: they are not stored, and a mask costs.
    x_row = tl.minimum(m, rows - 1) if JOINED else m
    x_at = x + x_row[None, :] * columns + k[:, None]
    if DENSE:
        w_row = tl.minimum(n, out_features - 1).to(tl.int64)
        w_at = weight + w_row[:, None] * columns + k[None, :]
    else:
        tile = tl.minimum(n // TILE_N, tl.cdiv(out_features, TILE_N) - 1)
        word = tl.arange(0, SLICE)[None, :]
        w_at = weight + (tile[:, None] * steps * TILE_N + n[:, None] % TILE_N) * SLICE + word
        scale_at = tile * groups * TILE_N + n % TILE_N
    table = codebook_table(levels, dtype) if CODES == "codebook" and not INTERPRETED else 0

    apart = tl.num_programs(1) > 1
    begin = tl.program_id(1)
    end = tl.where(apart, begin + 1, parts)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for part in range(begin, end):
        start = part * steps_each
        stop = tl.minimum(start + steps_each, steps)
        # If the loop might not run, ptxas makes each of Hopper's products wait for the one before.
        tl.assume(start < stop)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for step in range(start, stop):
            left = columns - step * WIDTH - k[:, None]
            if JOINED and WHOLE_STEPS:
                xs = tl.load(x_at + step * WIDTH)
            elif JOINED:
                xs = tl.load(x_at + step * WIDTH, mask=valid_m & (left > 0), other=0.0)
            else:
                xs = rows_of_slices(x_at + step * WIDTH, valid_m, left, WHOLE_STEPS)
            if DENSE:
                if WHOLE_STEPS:
                    w = tl.load(w_at + step * WIDTH)
                else:
                    w = tl.load(
                        w_at + step * WIDTH, mask=k[None, :] < columns - step * WIDTH, other=0.0
                    )
                acc = product(w, xs, acc)
            else:
                q = tl.load(w_at + step * (TILE_N * SLICE))
                w0, w1, w2, w3 = unpacked(q, levels, table, dtype, CODES)
                z0, z1, z2, z3 = 0.0, 0.0, 0.0, 0.0
                if HAS_ZEROS:
                    z0, z1, z2, z3 = of_slices(zeros + scale_at, step, SETS, GROUP, groups)
                s0, s1, s2, s3 = of_slices(scales + scale_at, step, SETS, GROUP, groups)
                w0 = scaled(w0, s0, z0, HAS_ZEROS, CENTRE)
                w1 = scaled(w1, s1, z1, HAS_ZEROS, CENTRE)
                w2 = scaled(w2, s2, z2, HAS_ZEROS, CENTRE)
                w3 = scaled(w3, s3, z3, HAS_ZEROS, CENTRE)
                if JOINED:
                    acc = product(side_by_side((w0, w1, w2, w3)), xs, acc)
                else:
                    x0, x1, x2, x3 = xs
                    acc = product(w0, x0, acc)
                    acc = product(w1, x1, acc)
                    acc = product(w2, x2, acc)
                    acc = product(w3, x3, acc)
        total += acc

    last = True
    if apart:
        block = tl.program_id(0)
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        sum_at = sums + block * parts * (BLOCK_N * BLOCK_M) + at
        tl.store(sum_at + begin * (BLOCK_N * BLOCK_M), total)
        tl.debug_barrier()  # every lane's part is written before this program is counted
        last = tl.atomic_add(arrived + block, 1, sem="acq_rel") == parts - 1
        if last:
            tl.store(arrived + block, 0)  # as the next launch expects
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in range(parts):
                total += tl.load(sum_at + part * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    if last:
        first_n = block_n * BLOCK_N
        store_outputs(
            total, bias, out, first_n, m, rows, out_features, dtype, HAS_BIAS, GATED, ACTIVATION
        )


class Order(NamedTuple):
    """The block shape of a weight, and how its columns are cut, for every number of rows.

    width: columns of a step. parts: of ``steps_each`` steps, the last one may be shorter.
    """

    block_n: int
    block_m: int
    width: int
    parts: int
    steps_each: int
    num_warps: int
    num_stages: int


def order_of(out_features: int, columns: int, group: int, processors: int, *, dense: bool) -> Order:
    """The one order of a weight's sums on a device with so many multiprocessors.

    group: columns of a scale, 0 for one a row.
    """
    # Scales of groups of 16 take registers that larger blocks do not have.
    block_n = 128 if out_features >= 2048 and group != 16 else 64
    wide_steps = triton.cdiv(columns, 128)
    parts = balanced_splits(triton.cdiv(out_features, block_n), wide_steps, processors)
    steps_each = triton.cdiv(wide_steps, parts)
    parts = triton.cdiv(wide_steps, steps_each)
    if dense:
        # The last half of a step of 128 columns may be empty, but never a part.
        return Order(block_n, 64, DENSE_STEP, parts, 2 * steps_each, 8, 4)
    return Order(block_n, 64, 128, parts, steps_each, 8, 3)


def joined(dense: bool, capability: int, whole_steps: bool) -> bool:
    """Whether a step is one product: see :func:`nybble.kernels.triton.matmul.joined`."""
    return dense or 100 <= capability < 120 or (capability == 90 and whole_steps)


def max_registers(dense: bool, capability: int, whole_steps: bool) -> int | None:
    """How many registers a thread may take. Left alone, ptxas aims at 128 on Ada, and spills."""
    return 168 if capability == 89 and whole_steps and not dense else None


def fixed_order_matmul(x: Tensor, weight: Weight, activation: Activation | None = None) -> Tensor:
    """``x @ W.T + bias``: ``(..., in_features)`` to ``(..., out_features)``, in one order.

    x: float16 or bfloat16; a 16-bit weight has its dtype. A packed weight which the kernel does not
    take is dequantized to 16 bits first, at every call.
    activation: of a weight in ``gpu_gated_tiles``, as in
    :func:`nybble.kernels.triton.matmul.packed_matmul`.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.in_features}")
    if activation is not None:
        check_activation(activation)
    if isinstance(weight, PackedWeight) and not takes(weight, x.dtype):
        weight = DenseWeight(weight.dequantize(x.dtype), weight.bias, weight.part_of)
    flat = x.reshape(-1, weight.in_features)
    packed = weight if isinstance(weight, PackedWeight) else None
    if packed is not None and packed.perm is not None:
        flat = flat.index_select(1, packed.perm)
    flat = flat.contiguous()
    rows, columns = flat.shape
    has_gates = packed is not None and packed.layout == "gpu_gated_tiles"
    if activation is not None and not has_gates:
        raise ValueError(f"{activation} of a weight that is not in gpu_gated_tiles")
    _, processors, capability = device_traits(x.device)
    width = weight.out_features // (2 if activation else 1)
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    group = 0 if packed is None or packed.groups == 1 else packed.group_size
    whole = weight.part_of or weight.out_features
    order = order_of(whole, columns, group, processors, dense=packed is None)
    blocks = triton.cdiv(weight.out_features, order.block_n) * triton.cdiv(rows, order.block_m)
    apart = order.parts if blocks < processors else 1
    size = blocks * order.parts * order.block_n * order.block_m if apart > 1 else 1
    fixed_order_kernel[(blocks, apart)](
        flat,
        weight.weight.contiguous()
        if isinstance(weight, DenseWeight)
        else weight.qweight.view(torch.int16),
        None if packed is None else packed.scales,
        None if packed is None else packed.zeros,
        None if packed is None else packed.levels,
        weight.bias,
        out,
        torch.empty(size, dtype=torch.float32, device=x.device),
        arrivals(x.device),
        rows,
        weight.out_features,
        columns,
        1 if packed is None else packed.groups,
        order.parts,
        order.steps_each,
        DENSE=packed is None,
        CODES="integer" if packed is None else packed.code_kind,
        HAS_ZEROS=packed is not None and packed.zeros is not None,
        HAS_BIAS=weight.bias is not None,
        GATED=has_gates,
        ACTIVATION=activation,
        **({"GROUP": 0, "SETS": 1} if packed is None else group_constants(packed)),
        JOINED=joined(packed is None, capability, columns % 128 == 0),
        WHOLE_STEPS=columns % order.width == 0,
        WIDTH=order.width,
        BLOCK_N=order.block_n,
        BLOCK_M=order.block_m,
        num_warps=order.num_warps,
        num_stages=order.num_stages,
        maxnreg=max_registers(packed is None, capability, columns % 128 == 0),
        **FUSED,
    )
    return out
