"""The matmul of a mixture's experts, in 4 or 16 bits: every row by the weights it was routed to.

Rows are sorted by expert on the device, and each expert's rows are cut into blocks
(:mod:`nybble.kernels.triton.routed_blocks`); a block looks up its expert and its first row. Only
experts with rows are read.

With 4-bit weights a block computes as the 4-bit matmul does
(:mod:`nybble.kernels.triton.matmul`), with scales applied after the product. Up to 8 rows have a
kernel of their own then (:mod:`nybble.kernels.triton.grouped_few_rows`), which sums in another
order; beside that, the order of a row's sums does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.packed import DenseWeight, PackedWeight, Weight
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.grouped_few_rows import (
    BLOCK_N,
    FEW_ROWS,
    PARTS,
    grouped_few_rows_kernel,
)
from nybble.kernels.triton.routed_blocks import Blocks
from nybble.kernels.triton.step import (
    SLICE,
    TILE_N,
    add_scaled_products,
    group_constants,
    of_slices,
    output_of,
    product,
    rows_of_slices,
    shifted,
    store_outputs,
    unpacked,
)
from nybble.kernels.triton.unpack import INTERPRETED, codebook_table

# Columns of a 16-bit weight in a step.
DENSE_STEP = 64


@triton.jit(do_not_specialize=["places", "groups"])
def grouped_kernel(
    x,  # (rows, columns), or (rows · top_k, columns) if X_PER_EXPERT
    matrices,  # int16 (experts, out / 64, columns / 128, 64, 32); DENSE: (experts, out, columns)
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
    DENSE: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a step
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    CENTRE: tl.constexpr = 8 if CODES == "integer" else 0
    expert = tl.load(expert_of + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    steps = tl.cdiv(columns, WIDTH)
    if HAS_BIAS:
        bias += expert * out_features
    row = tl.load(first_of + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    valid = row < tl.load(end_of + expert)
    place = tl.load(order + row, mask=valid, other=0)
    x_row = place if X_PER_EXPERT else place // TOP_K

    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # The columns of a whole step of a 16-bit weight, or of the first slice of a packed one's.
    k = tl.arange(0, WIDTH if DENSE else 32)
    x_at = x + x_row.to(tl.int64)[None, :] * columns + k[:, None]
    valid_m = valid[None, :]
    if DENSE:
        w_row = expert * out_features + tl.minimum(n, out_features - 1)
        w_at = matrices + w_row[:, None] * columns + k[None, :]
    else:
        tiles = tl.cdiv(out_features, TILE_N)
        tile = tl.minimum(n // TILE_N, tiles - 1)
        matrices += expert * tiles * steps * (TILE_N * SLICE)
        word = tl.arange(0, SLICE)[None, :]
        w_at = matrices + (tile[:, None] * steps * TILE_N + n[:, None] % TILE_N) * SLICE + word
        scales += expert * tiles * groups * TILE_N
        if HAS_ZEROS:
            zeros += expert * tiles * groups * TILE_N
        scale_at = tile * groups * TILE_N + n % TILE_N
        ahead = of_slices(scales + scale_at, 0, SETS, GROUP, groups)
    table = codebook_table(levels, dtype) if CODES == "codebook" and not INTERPRETED else 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    tl.assume(steps > 0)
    for step in range(0, steps):
        left = columns - step * WIDTH - k[:, None]
        if DENSE:
            if WHOLE_STEPS:
                xs = tl.load(x_at + step * WIDTH, mask=valid_m, other=0.0)
                w = tl.load(w_at + step * WIDTH)
            else:
                xs = tl.load(x_at + step * WIDTH, mask=valid_m & (left > 0), other=0.0)
                inside = k[None, :] < columns - step * WIDTH
                w = tl.load(w_at + step * WIDTH, mask=inside, other=0.0)
            acc = product(w, xs, acc)
        else:
            q = tl.load(w_at + step * (TILE_N * SLICE))
            xs = rows_of_slices(x_at + step * WIDTH, valid_m, left, WHOLE_STEPS)
            w0, w1, w2, w3 = unpacked(q, levels, table, dtype, CODES)
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
    matrices: their codes, or 16-bit weights ``(experts, out, in)``.
    scales, zeros, bias, perm: those of all, the expert first; None if they have none.
    """

    like: Weight
    count: int
    matrices: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None
    perm: Tensor | None

    @classmethod
    def of(cls, weights: Sequence[Weight]) -> StackedExperts:
        """Raises ValueError for weights that differ in size or kind."""
        first = weights[0]
        for number, weight in enumerate(weights):
            if _kind(weight) != _kind(first):
                raise ValueError(
                    f"expert {number} is stored in another way than expert 0, which a GPU does not "
                    "compute; quantize all experts alike"
                )
        matrices, *others = (
            None if each[0] is None else _together([t for t in each if t is not None])
            for each in zip(*map(_tensors, weights), strict=True)
        )
        assert matrices is not None
        return cls(first, len(weights), matrices, *others)


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """``(experts, …)``; a view if they lie one after another, as they are loaded."""
    first, size = tensors[0], tensors[0].numel()
    memory, start = first.untyped_storage().data_ptr(), first.storage_offset()
    for number, each in enumerate(tensors):
        in_turn = each.untyped_storage().data_ptr() == memory and each.is_contiguous()
        if not in_turn or each.storage_offset() != start + number * size:
            return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def _kind(weight: Weight) -> tuple[object, ...]:
    """What experts must have in common to be computed together."""
    sizes = weight.out_features, weight.in_features
    kinds = tuple(None if each is None else each.dtype for each in _tensors(weight))
    if isinstance(weight, DenseWeight):
        return *sizes, *kinds
    packed = weight.columns, weight.group_size, weight.layout, weight.level_values
    return *sizes, *kinds, *packed


def _tensors(weight: Weight) -> tuple[Tensor | None, ...]:
    if isinstance(weight, DenseWeight):
        return weight.weight, None, None, weight.bias, None
    return weight.qweight, weight.scales, weight.zeros, weight.bias, weight.perm


def block_sizes(places: int, experts: int) -> tuple[int, int, int]:
    """Outputs and rows of a block, and its warps, for so many rows of all experts together."""
    each = places / experts
    if each <= 16:
        return 64, 16, 4
    return (64, 32, 4) if each <= 32 else (128, 64, 8)


def takes(weight: Weight) -> bool:
    """Whether the kernel computes with this weight: groups must be whole slices of 32 columns."""
    if isinstance(weight, DenseWeight):
        return True
    in_slices = weight.groups == 1 or weight.group_size % 32 == 0
    return weight.layout in ("gpu_tiles", "gpu_gated_tiles") and in_slices


def grouped_matmul(
    x: Tensor, expert_ids: Tensor, weights: Tensor | None = None, *, experts: StackedExperts
) -> Tensor:
    """See :func:`nybble.kernels.reference.grouped_matmul`; float16 or bfloat16, as 16-bit weights.

    With weights, results are not rounded before they are added.
    """
    like, (rows, top_k) = experts.like, expert_ids.shape
    if x.shape not in ((rows, like.in_features), (rows, top_k, like.in_features)):
        raise ValueError(
            f"x is {tuple(x.shape)}, expected {(rows, like.in_features)} or "
            f"{(rows, top_k, like.in_features)}"
        )
    packed = like if isinstance(like, PackedWeight) else None
    if packed is None and x.dtype != experts.matrices.dtype:
        raise ValueError(f"x is {x.dtype}, but the experts are {experts.matrices.dtype}")
    if experts.perm is not None:
        # Every expert has an order of columns of its own.
        each = x.unsqueeze(1).expand(-1, top_k, -1) if x.ndim == 2 else x
        x = each.gather(2, experts.perm[expert_ids].long())
    x = x.contiguous()
    places, columns = rows * top_k, x.shape[-1]
    dtype = x.dtype if weights is None else torch.float32
    out = torch.empty(rows, top_k, like.out_features, dtype=dtype, device=x.device)
    if places:
        few = rows <= FEW_ROWS and packed is not None  # of which an expert has no more
        if few:
            block_n, block_m, num_warps = BLOCK_N, FEW_ROWS, PARTS
        else:
            block_n, block_m, num_warps = block_sizes(places, experts.count)
        width = DENSE_STEP if packed is None else 128
        blocks = Blocks.of(expert_ids, experts.count, block_m)
        kernel = grouped_few_rows_kernel if few else grouped_kernel
        kernel[(len(blocks.expert_of), triton.cdiv(like.out_features, block_n))](
            x,
            experts.matrices if packed is None else experts.matrices.view(torch.int16),
            experts.scales,
            experts.zeros,
            None if packed is None else packed.levels,
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
            1 if packed is None else packed.groups,
            TOP_K=top_k,
            X_PER_EXPERT=x.ndim == 3,
            WEIGHTED=weights is not None,
            CODES="integer" if packed is None else packed.code_kind,
            HAS_ZEROS=experts.zeros is not None,
            HAS_BIAS=experts.bias is not None,
            GATED=packed is not None and packed.layout == "gpu_gated_tiles",
            **({"GROUP": 0, "SETS": 1} if packed is None else group_constants(packed)),
            WHOLE_STEPS=columns % width == 0,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            **({"PARTS": PARTS} if few else {"DENSE": packed is None, "WIDTH": width}),
            num_warps=num_warps,
            num_stages=3,
            **FUSED,
        )
    return out if weights is None else out.sum(1).to(x.dtype)
