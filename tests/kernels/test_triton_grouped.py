"""The Triton matmul of experts computes what the reference does (interpreted, on the CPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble.kernels import PackedWeight, reference
from nybble.kernels.packed import (
    E2M1_LEVELS,
    INTEGER_LEVELS,
    SYMMETRIC_LEVELS,
    DenseWeight,
    Weight,
    pack_nibbles,
)
from nybble.kernels.triton import backend
from nybble.kernels.triton.grouped import StackedExperts, block_sizes, grouped_matmul
from nybble.kernels.triton.routed_blocks import Blocks, most_blocks

CODEBOOK = torch.linspace(-1, 1, 16).half().float()
# The interpreter truncates to bfloat16; a GPU rounds to nearest.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1.2e-2}


def random_weight(
    kind: str, out: int, columns: int, group: int, *, perm: bool = False, bias: bool = False
) -> PackedWeight:
    groups = -(-columns // group)
    known = {"symmetric": SYMMETRIC_LEVELS, "zeros": INTEGER_LEVELS}
    levels = (known | {"codebook": CODEBOOK, "e2m1": E2M1_LEVELS})[kind]
    return PackedWeight(
        qweight=pack_nibbles(torch.randint(0, 16, (out, columns)).to(torch.uint8)),
        scales=(torch.rand(out, groups) / 16 + 0.01).half(),
        zeros=torch.randint(0, 16, (out, groups)).half() if kind == "zeros" else None,
        levels=levels,
        out_features=out,
        in_features=columns,
        group_size=group,
        perm=torch.randperm(columns).int() if perm else None,
        bias=torch.randn(out).half() if bias else None,
    ).to_layout("gpu_tiles")


def route(rows: int, experts: int, top_k: int, load: str) -> Tensor:
    if load == "skewed":  # all rows to the same experts, none to the others
        return torch.arange(top_k).expand(rows, -1) + experts - top_k
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(rows)])


def in_float32(weight: Weight) -> DenseWeight:
    """Without its bias."""
    if isinstance(weight, PackedWeight):
        return DenseWeight(weight.dequantize())
    return DenseWeight(weight.weight.float())


def error(x: Tensor, ids: Tensor, weights: Tensor | None, experts: Sequence[Weight]) -> float:
    found = grouped_matmul(x, ids, weights, experts=StackedExperts.of(experts)).double()
    exact = [in_float32(expert) for expert in experts]
    expected = reference.grouped_linear(exact, torch.float32)(x.float(), ids, None).double()
    if experts[0].bias is not None:
        expected += torch.stack([e.bias.double() for e in experts if e.bias is not None])[ids]
    if weights is not None:
        expected = (expected * weights[..., None].double()).sum(1)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "codebook", "e2m1"])
@pytest.mark.parametrize("group", [32, pytest.param(64, marks=pytest.mark.slow), 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("load", [pytest.param("even", marks=pytest.mark.slow), "skewed"])
@pytest.mark.parametrize("rows", [4, 9], ids=["few rows", "more"])
def test_every_kind_of_weight(
    kind: str, group: int, dtype: torch.dtype, load: str, rows: int
) -> None:
    torch.manual_seed(0)
    experts = [random_weight(kind, 64, 128, group) for _ in range(5)]
    x, ids = torch.randn(rows, 128).to(dtype), route(rows, 5, 2, load)
    assert error(x, ids, None, experts) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("each", [False, True], ids=["one input", "an input for each expert"])
@pytest.mark.parametrize("weighted", [False, True])
def test_odd_sizes_orders_of_columns_and_biases(rows: int, each: bool, weighted: bool) -> None:
    torch.manual_seed(1)
    experts = [random_weight("zeros", 65, 129, 32, perm=True, bias=True) for _ in range(3)]
    ids = route(rows, 3, 2, "even")
    x = torch.randn(rows, *([2] if each else []), 129).half()
    assert error(x, ids, torch.rand(rows, 2) if weighted else None, experts) < 1e-3


@pytest.mark.parametrize("rows", [4, 9], ids=["few rows", "more"])
def test_experts_whose_scales_are_exponents(rows: int) -> None:
    """MXFP4's: the same result, bit for bit, as of the powers of two that they stand for."""
    torch.manual_seed(8)
    exponents = torch.randint(118, 126, (3, 1, 4, 64))
    wide = [random_weight("e2m1", 64, 128, 32) for _ in range(3)]
    wide = [replace(w, scales=2.0 ** (e - 127)) for w, e in zip(wide, exponents, strict=True)]
    in_bytes = [replace(w, scales=e.to(torch.uint8)) for w, e in zip(wide, exponents, strict=True)]
    x, ids = torch.randn(rows, 128).half(), route(rows, 3, 2, "even")
    found = grouped_matmul(x, ids, experts=StackedExperts.of(in_bytes))
    assert torch.equal(found, grouped_matmul(x, ids, experts=StackedExperts.of(wide)))


@pytest.mark.parametrize("rows", [5, 11])
def test_gate_and_up_keep_their_interleaved_layout(rows: int) -> None:
    torch.manual_seed(2)
    experts = [random_weight("symmetric", 96, 128, 64, bias=True) for _ in range(3)]
    gated = [expert.to_layout("gpu_gated_tiles") for expert in experts]
    x, ids = torch.randn(rows, 128).half(), route(rows, 3, 2, "even")
    plain = grouped_matmul(x, ids, experts=StackedExperts.of(experts))
    assert torch.equal(grouped_matmul(x, ids, experts=StackedExperts.of(gated)), plain)


@pytest.mark.parametrize(("rows", "fewer"), [(8, 1), (40, 9)])
def test_a_row_does_not_depend_on_the_others_of_one_kernel(rows: int, fewer: int) -> None:
    torch.manual_seed(3)
    stacked = StackedExperts.of([random_weight("zeros", 64, 256, 64) for _ in range(4)])
    x, ids, weights = torch.randn(rows, 256).half(), route(rows, 4, 2, "even"), torch.rand(rows, 2)
    together = grouped_matmul(x, ids, weights, experts=stacked)
    for row in (0, rows // 2, rows - fewer):
        own = slice(row, row + fewer)
        alone = grouped_matmul(x[own], ids[own], weights[own], experts=stacked)
        assert torch.equal(alone, together[own])


@pytest.mark.parametrize(
    ("rows", "load"), [(1, "even"), (6, "skewed"), (9, "even"), (70, "even"), (150, "skewed")]
)
@pytest.mark.parametrize("each", [False, True], ids=["one input", "an input for each expert"])
@pytest.mark.parametrize("weighted", [False, True])
def test_experts_in_16_bits(rows: int, load: str, each: bool, weighted: bool) -> None:
    """Sizes that are no whole blocks and steps; blocks of every number of rows."""
    torch.manual_seed(6)
    experts = [DenseWeight(torch.randn(70, 136).half(), torch.randn(70).half()) for _ in range(3)]
    ids = route(rows, 3, 2, load)
    x = torch.randn(rows, *([2] if each else []), 136).half()
    assert error(x, ids, torch.rand(rows, 2) if weighted else None, experts) < 1e-3


def test_experts_in_16_bits_have_the_dtype_of_their_inputs() -> None:
    torch.manual_seed(7)
    experts = [DenseWeight(torch.randn(64, 64).bfloat16()) for _ in range(3)]
    x, ids = torch.randn(9, 64), route(9, 3, 2, "even")
    assert error(x.bfloat16(), ids, None, experts) < TOLERANCE[torch.bfloat16]
    with pytest.raises(ValueError, match=r"x is torch.float16, but the experts are torch.bfloat16"):
        grouped_matmul(x.half(), ids, experts=StackedExperts.of(experts))


def test_columns_are_shared_by_the_warps_of_a_block_whatever_their_number() -> None:
    """Few rows: 8 warps take steps of 128 columns in turn, the last of which may be short."""
    torch.manual_seed(5)
    for columns in (96, 1024, 1120, 1300):
        experts = [random_weight("symmetric", 40, columns, 32, bias=True) for _ in range(3)]
        x, ids = torch.randn(3, columns).half(), route(3, 3, 2, "skewed")
        assert error(x, ids, None, experts) < 1e-3


@pytest.mark.parametrize("experts", [1, 3, 128])
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("load", ["even", "skewed"])
@pytest.mark.parametrize("block_m", [16, 64])
def test_blocks_cover_every_place_once_and_no_expert_that_has_none(
    experts: int, rows: int, load: str, block_m: int
) -> None:
    torch.manual_seed(4)
    ids = route(rows, experts, min(2, experts), load)
    blocks = Blocks.of(ids, experts, block_m)
    assert len(blocks.expert_of) == most_blocks(ids.numel(), experts, block_m)
    seen: list[int] = []
    for expert, first in zip(blocks.expert_of.tolist(), blocks.first_of.tolist(), strict=True):
        if expert < 0:
            continue
        end = min(first + block_m, int(blocks.end_of[expert]))
        places = blocks.order[first:end].tolist()
        assert places
        assert all(int(ids.flatten()[place]) == expert for place in places)
        seen += places
    assert sorted(seen) == list(range(ids.numel()))


def test_blocks_have_more_rows_if_experts_do() -> None:
    assert [block_sizes(places, 8)[1] for places in (2, 128, 129, 256, 257)] == [16, 16, 32, 32, 64]


def test_experts_stored_in_different_ways_are_refused() -> None:
    one, other = (random_weight("symmetric", 64, 128, group) for group in (32, 64))
    for different in (other, DenseWeight(torch.zeros(64, 128).half())):
        with pytest.raises(ValueError, match="expert 1 is stored in another way than expert 0"):
            StackedExperts.of([one, different])


def test_experts_in_small_groups_are_refused() -> None:
    experts = [random_weight("symmetric", 64, 128, 16)] * 2
    with pytest.raises(
        ValueError, match="experts in 16 bits, or in 4 bits in groups of a multiple"
    ):
        backend.grouped_linear(experts, torch.float16)


def test_inputs_of_another_size_are_refused() -> None:
    stacked = StackedExperts.of([random_weight("symmetric", 64, 128, 64)] * 2)
    with pytest.raises(ValueError, match="x is"):
        grouped_matmul(torch.zeros(3, 64).half(), torch.zeros(3, 1).long(), experts=stacked)
