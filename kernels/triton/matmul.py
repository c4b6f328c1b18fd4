"""The 4-bit matmul on tensor cores: ``x @ W.T + bias`` straight from packed codes.

A program computes a block of ``W @ x.T``, transposed so that the weight is the operand tensor cores
take from registers: a word goes from device memory through asynchronous copies to the lane that
multiplies with it, and is unpacked there. Each step covers 128 columns as four products of 32; or,
where weights are scaled before the product, from Hopper on, as one, so that tensor cores run while
the next weights are unpacked.

Few rows leave too few blocks to fill the GPU, so the columns are also split between programs. Each
leaves its float32 part in a workspace, and the last to finish a block adds the parts in order of
column, whatever order they finished in: results repeat bit for bit. Where blocks fill the GPU
several times but the last time only in part, it is the blocks of that last wave that are split.
Where they leave less than half of it idle, each may have two unequal parts: a processor that has
none of the long ones computes several short ones.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.activation import Activation, check_activation
from nybble.kernels.packed import PackedWeight
from nybble.kernels.triton.configs import Config, bucket_of, choose, for_group
from nybble.kernels.triton.dequantize import dense_matmul, stored_columns
from nybble.kernels.triton.device import FUSED, device_traits
from nybble.kernels.triton.few_rows import few_rows_matmul
from nybble.kernels.triton.opaque import opaque, opaque_zero
from nybble.kernels.triton.overlap import overlaps
from nybble.kernels.triton.step import (
    SLICE,
    STEP,
    TILE_N,
    add_scaled_products,
    fetch,
    group_constants,
    of_slices,
    product,
    rows_of_slices,
    scaled,
    shifted,
    side_by_side,
    store_outputs,
    unpacked,
)
from nybble.kernels.triton.unpack import INTERPRETED, codebook_table


@triton.jit
def block_of(program, blocks_n, blocks_m, GROUP_M: tl.constexpr):
    """Block coordinates, GROUP_M blocks of rows at a time so that both operands stay in L2."""
    group = program // (GROUP_M * blocks_n)
    first = group * GROUP_M
    size = tl.minimum(blocks_m - first, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    return within // size, first + within % size


@triton.jit
def place_of(
    program,
    rows,
    out_features,
    steps,
    whole,
    splits,
    steps_each,
    SPLIT: tl.constexpr,
    PAIR: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """What a program computes.

    Its first output and row; block and split, counted among those that are split; whether it is one
    of those; and its first step, and the one after its last.
    """
    blocks_n = tl.cdiv(out_features, BLOCK_N)
    blocks_m = tl.cdiv(rows, BLOCK_M)
    block, split, first, wide = program, 0, 0, blocks_n
    is_part = SPLIT
    if SPLIT:
        if TAIL:
            # Whether a block is split follows from its outputs alone, never from its rows.
            is_part = block >= whole * blocks_m
            first = tl.where(is_part, whole, 0)
            wide = tl.where(is_part, blocks_n - whole, whole)
            splits = tl.where(is_part, splits, 1)
            steps_each = tl.where(is_part, steps_each, steps)
        if PAIR:
            # Programs begin in order of their numbers: all first parts, the longer ones, before any
            # second one. Elsewhere this would take registers, and parts are alike.
            split = (block - first * blocks_m) // (wide * blocks_m)
            block = (block - first * blocks_m) % (wide * blocks_m)
        else:
            split = (block - first * blocks_m) % splits
            block = (block - first * blocks_m) // splits
    block_n, block_m = block_of(block, wide, blocks_m, GROUP_M)
    start, stop = 0, steps
    if SPLIT:
        start = split * steps_each
        stop = tl.minimum(start + steps_each, steps)
    return (first + block_n) * BLOCK_N, block_m * BLOCK_M, block, split, is_part, start, stop


@triton.jit(do_not_specialize=["rows", "groups", "whole", "splits", "steps_each"])
def matmul_kernel(
    x,  # (rows, columns)
    qweight,  # int16 (out / 64, columns / 128, 64, 32)
    scales,  # (out / 64, groups, 64)
    zeros,
    levels,
    bias,
    out,  # (rows, out_features)
    parts,  # float32, BLOCK_N × BLOCK_M for each block and split
    arrivals,  # int32, zero, one for each block
    rows,
    out_features,
    columns,
    groups,
    whole,  # blocks of outputs that are not split, the first ones
    splits,
    steps_each,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    JOINED: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIR: tl.constexpr,  # two parts, of which the last to finish adds the other to its own
    TAIL: tl.constexpr,
    OVERLAP: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    CENTRE: tl.constexpr = 8 if CODES == "integer" else 0
    # Registers are short if sums take half of them, or if scales are kept until after the product.
    CROWDED: tl.constexpr = BLOCK_N * BLOCK_M > 128 * 128 or not SCALE_FIRST
    steps = tl.cdiv(columns, STEP)
    first_n, first_m, _, _, _, start, stop = place_of(
        tl.program_id(0),
        rows,
        out_features,
        steps,
        whole,
        splits,
        steps_each,
        SPLIT,
        PAIR,
        TAIL,
        BLOCK_N,
        BLOCK_M,
        GROUP_M,
    )
    n = first_n + tl.arange(0, BLOCK_N)
    m = first_m + tl.arange(0, BLOCK_M)
    k = tl.arange(0, SLICE)
    tile = tl.minimum(n // TILE_N, tl.cdiv(out_features, TILE_N) - 1)
    q_at = qweight + (tile[:, None] * steps * TILE_N + n[:, None] % TILE_N) * SLICE + k[None, :]
    scale_at = tile * groups * TILE_N + n % TILE_N
    # A product's columns: those of a whole step, or of its first slice.
    x_k = tl.arange(0, 128 if JOINED else 32)
    # Rows past the last are not stored. Joined, or with masks for columns, they read the last one:
    # a mask for each row costs.
    REPEATED: tl.constexpr = JOINED or not WHOLE_STEPS
    valid_m = (m[None, :] < rows) | REPEATED
    x_row = tl.minimum(m, rows - 1) if REPEATED else m
    x_at = x + x_row[None, :] * columns + x_k[:, None]

    if OVERLAP and not INTERPRETED:
        # Weights do not depend on the kernel before: fetch the first ones while it finishes.
        # Everything else is accessed only after it.
        row_at = qweight + (tile * steps * TILE_N + n % TILE_N) * SLICE
        for soon in tl.static_range(4):
            fetch(row_at + tl.minimum(start + soon, steps - 1) * (TILE_N * SLICE))
        tl.extra.cuda.gdc_wait()
    table = codebook_table(levels, dtype) if CODES == "codebook" and not INTERPRETED else 0
    if SPLIT and not TAIL:
        # No part is without steps. If the loop might not run, ptxas makes each of Hopper's products
        # wait for the one before (C7515).
        tl.assume(start < stop)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    ahead = of_slices(scales + scale_at, start, SETS, GROUP, groups)
    for step in range(start, stop):
        if CROWDED:
            step = opaque(step)
        q = tl.load(q_at + step * (TILE_N * SLICE))
        left = columns - step * STEP - x_k[:, None]
        if JOINED and WHOLE_STEPS:
            xs = tl.load(x_at + step * STEP)
        elif JOINED:
            xs = tl.load(x_at + step * STEP, mask=left > 0, other=0.0)
        else:
            xs = rows_of_slices(x_at + step * STEP, valid_m, left, WHOLE_STEPS)
        w0, w1, w2, w3 = unpacked(q, levels, table, dtype, CODES)
        z0, z1, z2, z3 = 0.0, 0.0, 0.0, 0.0
        if HAS_ZEROS:
            z0, z1, z2, z3 = of_slices(zeros + scale_at, step, SETS, GROUP, groups)
        if SCALE_FIRST:
            # Loaded in this step: see kernels/README.md on what keeps operands in their layout.
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
        else:
            now = ahead
            ahead = of_slices(scales + scale_at, step + 1, SETS, GROUP, groups)
            w0 = shifted(w0, z0, HAS_ZEROS, CENTRE)
            w1 = shifted(w1, z1, HAS_ZEROS, CENTRE)
            w2 = shifted(w2, z2, HAS_ZEROS, CENTRE)
            w3 = shifted(w3, z3, HAS_ZEROS, CENTRE)
            acc = add_scaled_products(acc, (w0, w1, w2, w3), xs, now, SETS)

    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()
    # Recomputed in crowded blocks: values needed only at the end would stay in registers.
    zero = opaque_zero() if CROWDED else 0
    first_n, first_m, block, split, is_part, _, _ = place_of(
        tl.program_id(0) ^ zero,
        rows ^ zero,
        out_features ^ zero,
        steps,
        whole ^ zero,
        splits,
        steps_each,
        SPLIT,
        PAIR,
        TAIL,
        BLOCK_N,
        BLOCK_M,
        GROUP_M,
    )
    m = first_m + tl.arange(0, BLOCK_M)
    last = True
    if SPLIT:  # noqa: SIM102 (this is known when compiling, the next is not)
        if is_part:
            n = first_n + tl.arange(0, BLOCK_N)
            # A part is a whole block in the workspace: it needs no mask, and without one it is
            # accessed 16 bytes at a time. Where scales are kept, that takes registers.
            valid = (m[None, :] < rows) & (n[:, None] < out_features) | SCALE_FIRST
            at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            part_at = parts + block * splits * (BLOCK_N * BLOCK_M) + at
            last = False
            if PAIR:
                # The sum of two is the same in either order. If the other part is there already,
                # this one stays in registers.
                last = tl.atomic_add(arrivals + block, 0, sem="acquire") == 1
            if not last:
                tl.store(part_at + split * (BLOCK_N * BLOCK_M), acc, mask=valid)
                tl.debug_barrier()  # every lane's part is written before this program is counted
                last = tl.atomic_add(arrivals + block, 1, sem="acq_rel") == splits - 1
            if last:
                tl.store(arrivals + block, 0)  # as the next launch expects
                if PAIR:
                    piece = part_at + (1 - split) * (BLOCK_N * BLOCK_M)
                    acc += tl.load(piece, mask=valid, other=0.0, cache_modifier=".cg")
                else:
                    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                    for other in range(splits):
                        piece = part_at + other * (BLOCK_N * BLOCK_M)
                        acc += tl.load(piece, mask=valid, other=0.0, cache_modifier=".cg")
    if last:
        store_outputs(
            acc, bias, out, first_n, m, rows, out_features, dtype, HAS_BIAS, GATED, ACTIVATION
        )


_ARRIVALS = 1 << 14
MOST_ELEMENTS = (1 << 31) - 1  # of x or of the result, which the kernels count in 32 bits


@lru_cache
def arrivals(device: torch.device) -> Tensor:
    """Counters of finished parts, zero between launches. One stream of a device uses them."""
    return torch.zeros(_ARRIVALS, dtype=torch.int32, device=device)


def chosen(weight: PackedWeight, rows: int, device: torch.device) -> Config:
    """The configuration ``rows`` rows are computed with."""
    group = 0 if weight.groups == 1 else weight.group_size
    size = (weight.out_features, stored_columns(weight))
    return choose(*device_traits(device), weight.is_affine, group, *size, bucket_of(rows))


def joined(config: Config, capability: int, whole_steps: bool) -> bool:
    """Whether a step is one product. Before Hopper, joining moves weights about.

    On Hopper the masks of columns that end within a step would spill registers in its loop. On
    Blackwell four wide products may want more tensor memory than there is. GPUs from 120 on are
    named Blackwell too, but have Ampere's tensor cores.
    """
    return config.scale_first and (
        100 <= capability < 120 or (90 <= capability < 100 and whole_steps)
    )


def max_registers(config: Config, group: int, capability: int, whole_steps: bool) -> int | None:
    """How many registers a thread may take, if a limit lets two blocks share a multiprocessor.

    Hopper's blocks of 128 by 64 take up to 157 without one, and need no more than 128. Blocks of 64
    by 16 and 64 with groups of 16, from sm_120 on of 64 by 128 too, are given more than ptxas
    takes, which spills to fit in more of them.
    """
    block = config.block_n, config.block_m, config.num_warps
    spilling = [(64, 16, 4), (64, 64, 8), *([(64, 128, 8)] if capability >= 120 else [])]
    if group == 16 and block in spilling:
        return 128
    if capability == 90 and block == (128, 64, 8) and joined(config, capability, whole_steps):
        return 128
    return None


def takes(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether the kernel computes with this weight.

    Groups must be whole slices of 32 columns, or halves of them.
    """
    return (
        weight.layout in ("gpu_tiles", "gpu_gated_tiles")
        and dtype in (torch.float16, torch.bfloat16)
        and (weight.groups == 1 or weight.group_size % 32 == 0 or weight.group_size == 16)
    )


def packed_matmul(
    x: Tensor,
    weight: PackedWeight,
    config: Config | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """``x @ weight.dequantize().T + bias``: ``(..., in_features)`` to ``(..., out_features)``.

    x: float16 or bfloat16. The weight must pass :func:`takes`. Products are summed in float32.
    activation: of a weight in ``gpu_gated_tiles``, ``activation(gate) · up`` of the product's two
    halves, ``(..., out_features / 2)``, as :func:`nybble.kernels.reference.gated` rounds it.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.in_features}")
    has_gates = weight.layout == "gpu_gated_tiles"
    if activation is not None:
        check_activation(activation)
        if not has_gates:
            raise ValueError(f"{activation} of a weight in {weight.layout}, not gpu_gated_tiles")
    flat = x.reshape(-1, weight.in_features)
    if weight.perm is not None:
        flat = flat.index_select(1, weight.perm)
    flat = flat.contiguous()
    rows, columns = flat.shape
    width = weight.out_features // (2 if activation else 1)
    c = config or chosen(weight, rows, x.device)
    group = 0 if weight.groups == 1 else weight.group_size
    c = for_group(c, group)
    # A measured table may not know so many rows: past the kernels' 32-bit offsets.
    if c.dense or rows * max(columns, weight.out_features) > MOST_ELEMENTS:
        return dense_matmul(flat, weight, activation=activation).view(*x.shape[:-1], width)
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    can_overlap = x.is_cuda and device_traits(x.device)[2] >= 90
    # Blocks of many rows would spill registers for it, and run long enough.
    overlap = (c.overlap and can_overlap) or (overlaps(x.device) and c.block_m <= 64)
    if c.parts > 1:
        few_rows_matmul(flat, weight, out, c, overlap, activation)
        return out
    blocks_n = triton.cdiv(weight.out_features, c.block_n)
    blocks_m = triton.cdiv(rows, c.block_m)
    steps = triton.cdiv(columns, 128)
    steps_each = max(triton.cdiv(steps, c.splits), round(c.lead * steps))
    splits = triton.cdiv(steps, steps_each)
    whole = max(0, blocks_n - c.tail) if c.tail else 0
    split = (blocks_n - whole) * blocks_m if splits > 1 else 0
    if split > _ARRIVALS:
        raise ValueError(f"{split} blocks cannot be split: at most {_ARRIVALS}")
    size = max(1, split * splits * c.block_n * c.block_m)
    parts = torch.empty(size, dtype=torch.float32, device=x.device)
    programs = blocks_n * blocks_m + split * (splits - 1)
    matmul_kernel[(programs,)](
        flat,
        weight.qweight.view(torch.int16),
        weight.scales,
        weight.zeros,
        weight.levels,
        weight.bias,
        out,
        parts,
        arrivals(x.device),
        rows,
        weight.out_features,
        columns,
        weight.groups,
        whole,
        splits,
        steps_each,
        CODES=weight.code_kind,
        HAS_ZEROS=weight.zeros is not None,
        HAS_BIAS=weight.bias is not None,
        GATED=has_gates,
        ACTIVATION=activation,
        **group_constants(weight),
        SCALE_FIRST=c.scale_first,
        JOINED=joined(c, device_traits(x.device)[2], columns % 128 == 0),
        SPLIT=splits > 1,
        PAIR=splits == 2 and c.lead > 0,
        TAIL=splits > 1 and whole > 0,
        OVERLAP=overlap,
        WHOLE_STEPS=columns % 128 == 0,
        BLOCK_N=c.block_n,
        BLOCK_M=c.block_m,
        GROUP_M=8,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        maxnreg=max_registers(c, group, device_traits(x.device)[2], columns % 128 == 0),
        **({"launch_pdl": True} if overlap else {}),
        **FUSED,
    )
    return out
