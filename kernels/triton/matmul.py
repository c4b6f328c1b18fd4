"""The 4-bit matmul on tensor cores: ``x @ W.T + bias`` straight from packed codes.

A program computes a block of ``W @ x.T``, transposed so that the weight is the operand tensor cores
take from registers: a word goes from device memory through asynchronous copies to the lane that
multiplies with it, and is unpacked there. Each step covers 128 columns as four products of 32.

Few rows leave too few blocks to fill the GPU, so the columns are also split between programs. Each
leaves its float32 part in a workspace, and the last to finish a block adds the parts in order of
column, whatever order they finished in: results repeat bit for bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from nybble.kernels.packed import PackedWeight
from nybble.kernels.triton.configs import Config, bucket_of, choose
from nybble.kernels.triton.dequantize import dense_matmul, stored_columns
from nybble.kernels.triton.unpack import INTERPRETED, codebook_table, unpack_affine, unpack_codebook
from torch import Tensor

SLICE = tl.constexpr(32)
STEP = tl.constexpr(128)
TILE_N = tl.constexpr(64)


@triton.jit
def block_of(program, blocks_n, blocks_m, GROUP_M: tl.constexpr):
    """Block coordinates, GROUP_M blocks of rows at a time so that both operands stay in L2."""
    group = program // (GROUP_M * blocks_n)
    first = group * GROUP_M
    size = tl.minimum(blocks_m - first, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    return within // size, first + within % size


@triton.jit
def group_of(step, part: tl.constexpr, SETS: tl.constexpr, GROUP: tl.constexpr, groups):
    """The group of part ``part`` of SETS of step ``step``. GROUP 0 is one group for all columns."""
    if GROUP == 0:
        group = 0
    else:
        group = tl.minimum((step * STEP + part * (STEP // SETS)) // GROUP, groups - 1)
    return group


@triton.jit
def times_plus(w, factor, addend, HAS_ADDEND: tl.constexpr):
    """``w · factor + addend`` by row, in the dtype of ``w``: the interpreter has no bfloat16."""
    dtype: tl.constexpr = w.dtype
    if INTERPRETED:
        wide = w.to(tl.float32) * factor.to(dtype).to(tl.float32)[:, None]
        if HAS_ADDEND:
            wide += addend.to(dtype).to(tl.float32)[:, None]
        w = wide.to(dtype)
    else:
        w = w * factor.to(dtype)[:, None]
        if HAS_ADDEND:
            w = w + addend.to(dtype)[:, None]
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
        addend = (CENTRE - zero.to(tl.float32)).to(w.dtype)[:, None]
        w = (w.to(tl.float32) + addend.to(tl.float32)).to(w.dtype) if INTERPRETED else w + addend
    return w


@triton.jit
def product(w, x, acc):
    """``acc + w @ x``, summed in float32."""
    return tl.dot(w.to(tl.float32), x.to(tl.float32), acc) if INTERPRETED else tl.dot(w, x, acc)


@triton.jit(do_not_specialize=["rows", "splits", "steps_each"])
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
    splits,
    steps_each,
    CODEBOOK: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    CENTRE: tl.constexpr = 0 if CODEBOOK else 8
    steps = tl.cdiv(columns, STEP)
    blocks_n = tl.cdiv(out_features, BLOCK_N)
    blocks_m = tl.cdiv(rows, BLOCK_M)
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    block_n, block_m = block_of(block, blocks_n, blocks_m, GROUP_M)

    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, SLICE)
    tile = tl.minimum(n // TILE_N, tl.cdiv(out_features, TILE_N) - 1)
    q_at = qweight + (tile[:, None] * steps * TILE_N + n[:, None] % TILE_N) * SLICE + k[None, :]
    scale_at = tile * groups * TILE_N + n % TILE_N
    x_at = x + m[None, :] * columns + k[:, None]
    valid_m = m[None, :] < rows

    table = codebook_table(levels, dtype) if CODEBOOK and not INTERPRETED else 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = split * steps_each
    for step in range(start, tl.minimum(start + steps_each, steps)):
        q = tl.load(q_at + step * (TILE_N * SLICE))
        if WHOLE_STEPS:
            x0 = tl.load(x_at + step * STEP, mask=valid_m, other=0.0)
            x1 = tl.load(x_at + step * STEP + SLICE, mask=valid_m, other=0.0)
            x2 = tl.load(x_at + step * STEP + 2 * SLICE, mask=valid_m, other=0.0)
            x3 = tl.load(x_at + step * STEP + 3 * SLICE, mask=valid_m, other=0.0)
        else:
            left = columns - step * STEP - k[:, None]
            x0 = tl.load(x_at + step * STEP, mask=valid_m & (left > 0), other=0.0)
            x1 = tl.load(x_at + step * STEP + 32, mask=valid_m & (left > 32), other=0.0)
            x2 = tl.load(x_at + step * STEP + 64, mask=valid_m & (left > 64), other=0.0)
            x3 = tl.load(x_at + step * STEP + 96, mask=valid_m & (left > 96), other=0.0)
        if not CODEBOOK:
            w0, w1, w2, w3 = unpack_affine(q, dtype)
        else:
            w0, w1, w2, w3 = unpack_codebook(q, levels, table, BLOCK_N, dtype)

        # Slice i belongs to part i·SETS/4; slices of one part share scale and zero.
        g0 = scale_at + group_of(step, 0, SETS, GROUP, groups) * TILE_N
        s0 = tl.load(scales + g0)
        z0 = tl.load(zeros + g0) if HAS_ZEROS else 0.0
        s1, z1, s2, z2, s3, z3 = s0, z0, s0, z0, s0, z0
        if SETS == 2:
            g2 = scale_at + group_of(step, 1, SETS, GROUP, groups) * TILE_N
            s2 = tl.load(scales + g2)
            z2 = tl.load(zeros + g2) if HAS_ZEROS else 0.0
            s3, z3 = s2, z2
        if SETS == 4:
            g1 = scale_at + group_of(step, 1, SETS, GROUP, groups) * TILE_N
            g2 = scale_at + group_of(step, 2, SETS, GROUP, groups) * TILE_N
            g3 = scale_at + group_of(step, 3, SETS, GROUP, groups) * TILE_N
            s1 = tl.load(scales + g1)
            s2 = tl.load(scales + g2)
            s3 = tl.load(scales + g3)
            z1 = tl.load(zeros + g1) if HAS_ZEROS else 0.0
            z2 = tl.load(zeros + g2) if HAS_ZEROS else 0.0
            z3 = tl.load(zeros + g3) if HAS_ZEROS else 0.0

        if SCALE_FIRST:
            acc = product(scaled(w0, s0, z0, HAS_ZEROS, CENTRE), x0, acc)
            acc = product(scaled(w1, s1, z1, HAS_ZEROS, CENTRE), x1, acc)
            acc = product(scaled(w2, s2, z2, HAS_ZEROS, CENTRE), x2, acc)
            acc = product(scaled(w3, s3, z3, HAS_ZEROS, CENTRE), x3, acc)
        else:
            w0 = shifted(w0, z0, HAS_ZEROS, CENTRE)
            w1 = shifted(w1, z1, HAS_ZEROS, CENTRE)
            w2 = shifted(w2, z2, HAS_ZEROS, CENTRE)
            w3 = shifted(w3, z3, HAS_ZEROS, CENTRE)
            part = product(w0, x0, nothing)
            if SETS == 4:
                acc += s0.to(tl.float32)[:, None] * part
                part = product(w1, x1, nothing)
                acc += s1.to(tl.float32)[:, None] * part
                part = product(w2, x2, nothing)
                acc += s2.to(tl.float32)[:, None] * part
                part = product(w3, x3, nothing)
            elif SETS == 2:
                part = product(w1, x1, part)
                acc += s0.to(tl.float32)[:, None] * part
                part = product(w2, x2, nothing)
                part = product(w3, x3, part)
            else:
                part = product(w1, x1, part)
                part = product(w2, x2, part)
                part = product(w3, x3, part)
            acc += s3.to(tl.float32)[:, None] * part

    valid = valid_m & (n[:, None] < out_features)
    last = True
    if SPLIT:
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        part_at = parts + block * splits * (BLOCK_N * BLOCK_M) + at
        tl.store(part_at + split * (BLOCK_N * BLOCK_M), acc, mask=valid)
        tl.debug_barrier()  # every lane's part is written before this program is counted
        last = tl.atomic_add(arrivals + block, 1, sem="acq_rel") == splits - 1
        if last:
            tl.store(arrivals + block, 0)  # as the next launch expects
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in range(splits):
                piece = part_at + other * (BLOCK_N * BLOCK_M)
                acc += tl.load(piece, mask=valid, other=0.0, cache_modifier=".cg")
    if last:
        if HAS_BIAS:
            b = tl.load(bias + n, mask=n < out_features, other=0.0)
            acc += b.to(tl.float32)[:, None]
        tl.store(out + m[None, :] * out_features + n[:, None], acc.to(dtype), mask=valid)


_ARRIVALS = 1 << 14


@lru_cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters of finished parts, zero between launches. One stream of a device uses them."""
    return torch.zeros(_ARRIVALS, dtype=torch.int32, device=device)


@lru_cache
def _name_and_processors(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "interpreter", 132
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def chosen(weight: PackedWeight, rows: int, device: torch.device) -> Config:
    """The configuration ``rows`` rows are computed with."""
    name, processors = _name_and_processors(device)
    group = 0 if weight.groups == 1 else weight.group_size
    columns = stored_columns(weight)
    bucket = bucket_of(rows)
    return choose(name, processors, weight.is_affine, group, weight.out_features, columns, bucket)


def takes(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether the kernel computes with this weight: groups must be whole slices of 32 columns."""
    return (
        weight.layout == "gpu_tiles"
        and dtype in (torch.float16, torch.bfloat16)
        and (weight.groups == 1 or weight.group_size % 32 == 0)
    )


def scale_sets(weight: PackedWeight) -> int:
    """How many different scales a step of 128 columns can meet: 1, 2 or 4."""
    if weight.groups == 1 or weight.group_size % 128 == 0:
        return 1
    return 2 if weight.group_size == 64 else 4


def packed_matmul(x: Tensor, weight: PackedWeight, config: Config | None = None) -> Tensor:
    """``x @ weight.dequantize().T + bias``: ``(..., in_features)`` to ``(..., out_features)``.

    x: float16 or bfloat16. The weight must pass :func:`takes`. Products are summed in float32.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.in_features}")
    flat = x.reshape(-1, weight.in_features)
    if weight.perm is not None:
        flat = flat.index_select(1, weight.perm)
    flat = flat.contiguous()
    rows, columns = flat.shape
    c = config or chosen(weight, rows, x.device)
    if c.dense:
        return dense_matmul(flat, weight).view(*x.shape[:-1], weight.out_features)
    out = torch.empty(*x.shape[:-1], weight.out_features, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    blocks = triton.cdiv(weight.out_features, c.block_n) * triton.cdiv(rows, c.block_m)
    steps = triton.cdiv(columns, 128)
    steps_each = triton.cdiv(steps, c.splits)
    splits = triton.cdiv(steps, steps_each)
    if splits > 1 and blocks > _ARRIVALS:
        raise ValueError(f"{blocks} blocks cannot be split: at most {_ARRIVALS}")
    size = blocks * splits * c.block_n * c.block_m if c.splits > 1 else 1
    parts = torch.empty(size, dtype=torch.float32, device=x.device)
    matmul_kernel[(blocks * splits,)](
        flat,
        weight.qweight.view(torch.int16),
        weight.scales,
        weight.zeros,
        weight.levels,
        weight.bias,
        out,
        parts,
        _arrivals(x.device),
        rows,
        weight.out_features,
        columns,
        weight.groups,
        splits,
        steps_each,
        CODEBOOK=not weight.is_affine,
        HAS_ZEROS=weight.zeros is not None,
        HAS_BIAS=weight.bias is not None,
        GROUP=0 if weight.groups == 1 else weight.group_size,
        SETS=scale_sets(weight),
        SCALE_FIRST=c.scale_first,
        SPLIT=c.splits > 1,
        WHOLE_STEPS=columns % 128 == 0,
        BLOCK_N=c.block_n,
        BLOCK_M=c.block_m,
        GROUP_M=8,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return out
