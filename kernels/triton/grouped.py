"""The 4-bit matmul of a mixture's experts: every row by the weights it was routed to.

Rows are sorted by expert on the device, and each expert's rows are cut into blocks. The grid has as
many blocks as any routing of so many rows can need; a block looks up its expert and its first row,
and those that are left over end at once. So nothing waits for the host, shapes do not depend on the
routing, and a CUDA graph can hold it. Only experts with rows are read.

A block computes as the 4-bit matmul does (:mod:`nybble.kernels.triton.matmul`), with scales applied
after the product. Up to 8 rows have a kernel of their own
(:mod:`nybble.kernels.triton.grouped_few_rows`), which sums in another order; beside that, the order
of a row's sums does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.packed import PackedWeight
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.grouped_few_rows import (
    BLOCK_N,
    FEW_ROWS,
    PARTS,
    grouped_few_rows_kernel,
)
from nybble.kernels.triton.step import (
    SLICE,
    STEP,
    TILE_N,
    add_scaled_products,
    group_constants,
    of_slices,
    output_of,
    rows_of_slices,
    shifted,
    store_outputs,
    unpacked,
)
from nybble.kernels.triton.unpack import INTERPRETED, codebook_table


@triton.jit(do_not_specialize=["places", "groups"])
def grouped_kernel(
    x,  # (rows, columns), or (rows · top_k, columns) if X_PER_EXPERT
    qweight,  # int16 (experts, out / 64, columns / 128, 64, 32)
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
    CODEBOOK: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    CENTRE: tl.constexpr = 0 if CODEBOOK else 8
    expert = tl.load(expert_of + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    steps = tl.cdiv(columns, STEP)
    tiles = tl.cdiv(out_features, TILE_N)
    qweight += expert * tiles * steps * (TILE_N * SLICE)
    scales += expert * tiles * groups * TILE_N
    if HAS_ZEROS:
        zeros += expert * tiles * groups * TILE_N
    if HAS_BIAS:
        bias += expert * out_features
    row = tl.load(first_of + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    valid = row < tl.load(end_of + expert)
    place = tl.load(order + row, mask=valid, other=0)
    x_row = place if X_PER_EXPERT else place // TOP_K

    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, SLICE)
    tile = tl.minimum(n // TILE_N, tiles - 1)
    q_at = qweight + (tile[:, None] * steps * TILE_N + n[:, None] % TILE_N) * SLICE + k[None, :]
    scale_at = tile * groups * TILE_N + n % TILE_N
    x_at = x + x_row.to(tl.int64)[None, :] * columns + k[:, None]
    valid_m = valid[None, :]
    table = codebook_table(levels, dtype) if CODEBOOK and not INTERPRETED else 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    ahead = of_slices(scales + scale_at, 0, SETS, GROUP, groups)
    tl.assume(steps > 0)
    for step in range(0, steps):
        q = tl.load(q_at + step * (TILE_N * SLICE))
        left = columns - step * STEP - k[:, None]
        xs = rows_of_slices(x_at + step * STEP, valid_m, left, WHOLE_STEPS)
        w0, w1, w2, w3 = unpacked(q, levels, table, dtype, CODEBOOK)
        z0, z1, z2, z3 = 0.0, 0.0, 0.0, 0.0
        if HAS_ZEROS:
            z0, z1, z2, z3 = of_slices(zeros + scale_at, step, SETS, GROUP, groups)
        now = ahead
        ahead = of_slices(scales + scale_at, step + 1, SETS, GROUP, groups)
        w0 = shifted(w0, z0, HAS_ZEROS, CENTRE)
        w1 = shifted(w1, z1, HAS_ZEROS, CENTRE)
        w2 = shifted(w2, z2, HAS_ZEROS, CENTRE)
        w3 = shifted(w3, z3, HAS_ZEROS, CENTRE)
        acc = add_scaled_products(acc, (w0, w1, w2, w3), xs, now, SETS)

    first = tl.program_id(1) * BLOCK_N
    m = tl.where(valid, place, places)  # those beyond are not stored
    if WEIGHTED:
        if HAS_BIAS:
            at = output_of(n, out_features, GATED)
            acc += tl.load(bias + at, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
        acc *= tl.load(weights + place, mask=valid, other=0.0)[None, :]
        store_outputs(
            acc, bias, out, first, m, places, out_features, tl.float32, False, GATED, None
        )
    else:
        store_outputs(acc, bias, out, first, m, places, out_features, dtype, HAS_BIAS, GATED, None)


@dataclass(frozen=True)
class StackedExperts:
    """The weights of experts that are stored alike, on one device.

    like: one of them, for its sizes and its kind.
    qweight, scales, zeros, bias, perm: those of all, the expert first; None if they have none.
    """

    like: PackedWeight
    count: int
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    perm: Tensor | None

    @classmethod
    def of(cls, weights: Sequence[PackedWeight]) -> StackedExperts:
        """Raises ValueError for weights that differ in size or kind."""
        first = weights[0]
        for number, weight in enumerate(weights):
            if (
                _kind(weight) != _kind(first)
                or weight.level_values != first.level_values
                or any(
                    (a is None) != (b is None)
                    for a, b in zip(_optional(weight), _optional(first), strict=True)
                )
            ):
                raise ValueError(
                    f"expert {number} is stored in another way than expert 0, which a GPU does not "
                    "compute; quantize all experts alike"
                )
        zeros, bias, perm = (
            None if each[0] is None else torch.stack([t for t in each if t is not None])
            for each in zip(*map(_optional, weights), strict=True)
        )
        return cls(
            first,
            len(weights),
            torch.stack([weight.qweight for weight in weights]),
            torch.stack([weight.scales for weight in weights]),
            zeros,
            bias,
            perm,
        )


def _kind(weight: PackedWeight) -> tuple[object, ...]:
    return (
        *(weight.out_features, weight.in_features, weight.columns, weight.group_size),
        *(weight.layout, weight.scales.dtype),
    )


def _optional(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    return weight.zeros, weight.bias, weight.perm


@dataclass(frozen=True)
class Blocks:
    """Which rows each block of the grid computes; see :func:`grouped_kernel` for the tensors."""

    order: Tensor
    expert_of: Tensor
    first_of: Tensor
    end_of: Tensor

    @classmethod
    def of(cls, expert_ids: Tensor, experts: int, block_m: int) -> Blocks:
        """For ``expert_ids (rows, top_k)``; all shapes follow from its shape alone."""
        flat = expert_ids.flatten()
        count = most_blocks(len(flat), experts, block_m)
        counts = torch.zeros(experts, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        ends, blocks = counts.cumsum(0), (counts + block_m - 1) // block_m
        block_ends = blocks.cumsum(0)
        index = torch.arange(count, device=flat.device)
        expert = torch.searchsorted(block_ends, index, right=True)
        known = expert.clamp(max=experts - 1)
        before = index - (block_ends - blocks)[known]
        return cls(
            flat.argsort(stable=True).int(),
            torch.where(expert < experts, expert, -1).int(),
            ((ends - counts)[known] + before * block_m).int(),
            ends.int(),
        )


def most_blocks(places: int, experts: int, block_m: int) -> int:
    """The most blocks that any routing needs: each expert's last block may hold a single row."""
    used = min(experts, places)
    return (places + used * (block_m - 1)) // block_m


def block_sizes(places: int, experts: int) -> tuple[int, int, int]:
    """Outputs and rows of a block, and its warps, for so many rows of all experts together."""
    each = places / experts
    if each <= 16:
        return 64, 16, 4
    return (64, 32, 4) if each <= 32 else (128, 64, 8)


def takes(weight: PackedWeight) -> bool:
    """Whether the kernel computes with this weight: groups must be whole slices of 32 columns."""
    in_slices = weight.groups == 1 or weight.group_size % 32 == 0
    return weight.layout in ("gpu_tiles", "gpu_gated_tiles") and in_slices


def grouped_matmul(
    x: Tensor, expert_ids: Tensor, weights: Tensor | None = None, *, experts: StackedExperts
) -> Tensor:
    """See :func:`nybble.kernels.reference.grouped_matmul`; float16 or bfloat16.

    With weights, results are not rounded before they are added.
    """
    like, (rows, top_k) = experts.like, expert_ids.shape
    if x.shape not in ((rows, like.in_features), (rows, top_k, like.in_features)):
        raise ValueError(
            f"x is {tuple(x.shape)}, expected {(rows, like.in_features)} or "
            f"{(rows, top_k, like.in_features)}"
        )
    if experts.perm is not None:
        # Every expert has an order of columns of its own.
        each = x.unsqueeze(1).expand(-1, top_k, -1) if x.ndim == 2 else x
        x = each.gather(2, experts.perm[expert_ids].long())
    x = x.contiguous()
    places, columns = rows * top_k, like.columns
    dtype = x.dtype if weights is None else torch.float32
    out = torch.empty(rows, top_k, like.out_features, dtype=dtype, device=x.device)
    if places:
        few = rows <= FEW_ROWS  # of which an expert has no more
        if few:
            block_n, block_m, num_warps = BLOCK_N, FEW_ROWS, PARTS
        else:
            block_n, block_m, num_warps = block_sizes(places, experts.count)
        blocks = Blocks.of(expert_ids, experts.count, block_m)
        kernel = grouped_few_rows_kernel if few else grouped_kernel
        kernel[(len(blocks.expert_of), triton.cdiv(like.out_features, block_n))](
            x,
            experts.qweight.view(torch.int16),
            experts.scales,
            experts.zeros,
            like.levels,
            experts.bias,
            None if weights is None else weights.float().contiguous(),
            out,
            blocks.order,
            blocks.expert_of,
            blocks.first_of,
            blocks.end_of,
            places,
            like.out_features,
            columns,
            like.groups,
            TOP_K=top_k,
            X_PER_EXPERT=x.ndim == 3,
            WEIGHTED=weights is not None,
            CODEBOOK=not like.is_affine,
            HAS_ZEROS=experts.zeros is not None,
            HAS_BIAS=experts.bias is not None,
            GATED=like.layout == "gpu_gated_tiles",
            **group_constants(like),
            WHOLE_STEPS=columns % 128 == 0,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            **({"PARTS": PARTS} if few else {}),
            num_warps=num_warps,
            num_stages=3,
            **FUSED,
        )
    return out if weights is None else out.sum(1).to(x.dtype)
