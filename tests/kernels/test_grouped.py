"""Linear layers of a mixture's experts: every row by the experts it was routed to."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.kernels import DenseWeight, PackedWeight, reference
from nybble.kernels.cpu.library import CpuLibrary
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles
from nybble.models import Router

from .cpu_kernels import CODEBOOK

pytestmark = pytest.mark.usefixtures("two_threads")


def random_experts(
    count: int, out: int, columns: int, group: int, kind: str, *, act_order: bool, bias: bool
) -> list[PackedWeight]:
    """Experts of one kind, each with its own order of columns."""
    groups = -(-columns // group)
    levels = {"asym": INTEGER_LEVELS, "sym": SYMMETRIC_LEVELS, "codebook": CODEBOOK}[kind]
    return [
        PackedWeight(
            qweight=pack_nibbles(torch.randint(0, 16, (out, columns), dtype=torch.uint8)),
            scales=torch.rand(out, groups).half(),
            zeros=torch.randint(0, 16, (out, groups)).half() if kind == "asym" else None,
            levels=levels,
            out_features=out,
            in_features=columns,
            group_size=group,
            perm=torch.randperm(columns).int() if act_order else None,
            bias=torch.randn(out).bfloat16() if bias else None,
        )
        for _ in range(count)
    ]


def route(rows: int, count: int, top_k: int, load: str) -> Tensor:
    """Different experts for every row; ``skewed``: the same for all rows."""
    if load == "skewed":
        return torch.randperm(count)[:top_k].expand(rows, -1)
    return torch.stack([torch.randperm(count)[:top_k] for _ in range(rows)])


def by_definition(
    x: Tensor, expert_ids: Tensor, weights: Tensor | None, experts: list[PackedWeight]
) -> Tensor:
    """float64, from the dequantized weights of all experts."""
    each = (x.unsqueeze(1).expand(-1, expert_ids.shape[1], -1) if x.ndim == 2 else x).double()
    dense = torch.stack([expert.dequantize().double() for expert in experts])
    out = torch.einsum("rkoi,rki->rko", dense[expert_ids], each)
    if experts[0].bias is not None:
        biases = torch.stack([e.bias.double() for e in experts if e.bias is not None])
        out += biases[expert_ids]
    return out if weights is None else (out * weights[..., None].double()).sum(1)


@pytest.mark.parametrize("each", [False, True], ids=["one input", "an input for each expert"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_reference_is_the_definition(each: bool, weighted: bool) -> None:
    torch.manual_seed(0)
    experts = random_experts(5, 24, 32, 16, "asym", act_order=True, bias=True)
    ids = route(7, 5, 3, "even")
    x = torch.randn(7, 3, 32) if each else torch.randn(7, 32)
    weights = torch.rand(7, 3) if weighted else None
    found = reference.grouped_linear(experts, torch.float32)(x, ids, weights)
    expected = by_definition(x, ids, weights, experts)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)


def test_experts_without_rows_are_not_computed() -> None:
    computed: list[int] = []

    def expert(x: Tensor, number: int) -> Tensor:
        computed.append(number)
        return x

    experts = [partial(expert, number=number) for number in range(128)]
    ids = torch.tensor([[90, 3]])
    out = reference.grouped_matmul(torch.ones(1, 4), ids, experts=experts)
    assert computed == [3, 90]
    assert out.shape == (1, 2, 4)


@given(
    rows=st.sampled_from([1, 2, 3, 9, 40]),
    count=st.integers(3, 6),
    out=st.integers(1, 90),
    groups=st.integers(1, 3),
    group=st.sampled_from([8, 16, 64, 136]),
    short=st.integers(0, 7),
    kind=st.sampled_from(["asym", "sym", "codebook"]),
    load=st.sampled_from(["even", "skewed"]),
    act_order=st.booleans(),
    bias=st.booleans(),
    each=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_the_kernel_is_the_reference_over_its_own_products_to_the_bit(
    cpu: CpuLibrary,
    rows: int,
    count: int,
    out: int,
    groups: int,
    group: int,
    short: int,
    kind: str,
    load: str,
    act_order: bool,
    bias: bool,
    each: bool,
    weighted: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    columns = groups * group - short
    experts = [
        expert.to_layout("cpu_tiles")
        for expert in random_experts(
            count, out, columns, group, kind, act_order=act_order, bias=bias
        )
    ]
    ids = route(rows, count, 3, load)
    x = torch.randn(rows, *([3] if each else []), columns).bfloat16()
    weights = torch.rand(rows, 3) if weighted else None
    kernel: Any = cpu.grouped_linear(experts, torch.bfloat16)
    assert kernel.func == cpu._grouped_matmul, "computed by the reference"
    expected = reference.grouped_matmul(
        x, ids, weights, experts=[cpu.linear(expert, torch.bfloat16) for expert in experts]
    )
    found = kernel(x, ids, weights)
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_experts_of_many_outputs_are_their_own_products_to_the_bit(cpu: CpuLibrary) -> None:
    """The kernel's tasks are larger then, than those of one expert alone."""
    torch.manual_seed(0)
    experts = [
        expert.to_layout("cpu_tiles")
        for expert in random_experts(5, 1593, 64, 32, "asym", act_order=False, bias=True)
    ]
    linears = [cpu.linear(expert, torch.bfloat16) for expert in experts]
    kernel = cpu.grouped_linear(experts, torch.bfloat16)
    for rows in (1, 3):
        ids, x = route(rows, 5, 4, "even"), torch.randn(rows, 64).bfloat16()
        expected = reference.grouped_matmul(x, ids, None, experts=linears)
        assert torch.equal(kernel(x, ids, None), expected)


def test_the_kernel_reads_only_the_experts_that_have_rows(cpu: CpuLibrary) -> None:
    experts = random_experts(128, 48, 64, 32, "asym", act_order=True, bias=True)
    kernel: Any = cpu.grouped_linear(
        [expert.to_layout("cpu_tiles") for expert in experts], torch.bfloat16
    )
    ids = torch.randperm(128)[None, :8]
    x = torch.randn(1, 64).bfloat16()
    expected = kernel(x, ids, None)
    addresses = kernel.keywords["experts"].addresses
    others = torch.ones(128, dtype=torch.bool)
    others[ids] = False
    addresses[others] = 0  # reading there ends the process
    assert torch.equal(kernel(x, ids, None), expected)


def test_experts_stored_in_different_ways_are_computed_one_by_one(cpu: CpuLibrary) -> None:
    torch.manual_seed(0)
    packed = random_experts(3, 16, 32, 16, "asym", act_order=False, bias=False)
    (other,) = random_experts(1, 16, 32, 8, "sym", act_order=False, bias=False)
    dense = DenseWeight(torch.randn(16, 32).bfloat16())
    experts = [*(expert.to_layout("cpu_tiles") for expert in (*packed, other)), dense]
    ids, x = route(6, 5, 2, "even"), torch.randn(6, 32).bfloat16()
    found = cpu.grouped_linear(experts, torch.bfloat16)(x, ids, None)
    expected = by_definition(x, ids, None, [*packed, other, other])
    of_dense = torch.einsum("ri,oi->ro", x.double(), dense.weight.double())
    expected[ids == 4] = of_dense[(ids == 4).any(1)]
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2e-2, atol=5e-2)


def test_what_the_kernel_would_misread_is_refused(cpu: CpuLibrary) -> None:
    experts = random_experts(4, 16, 32, 16, "asym", act_order=False, bias=False)
    kernel = cpu.grouped_linear([e.to_layout("cpu_tiles") for e in experts], torch.bfloat16)
    ids = torch.zeros(2, 2, dtype=torch.int64)
    for x, bad_ids in (
        (torch.zeros(2, 31).bfloat16(), ids),
        (torch.zeros(3, 32).bfloat16(), ids),
        (torch.zeros(2, 32), ids),
        (torch.zeros(2, 32).bfloat16(), ids.int()),
    ):
        with pytest.raises(ValueError, match="CPU kernels take"):
            kernel(x, bad_ids, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [48, 2048])
def test_a_routers_logits_are_those_of_float64_and_the_same_in_company(
    cpu: CpuLibrary, dtype: torch.dtype, hidden: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, hidden, generator=generator).to(dtype)
    weight, bias = torch.randn(9, hidden, generator=generator), torch.randn(9, generator=generator)
    for added in (bias, None):
        found = cpu.router_logits(x, weight, added)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found, reference.router_logits(x, weight, added), rtol=1e-5, atol=1e-4
        )
        each = [cpu.router_logits(row[None], weight, added) for row in x]
        assert torch.equal(torch.cat(each), found)
    with pytest.raises(ValueError, match="contiguous float32 weight"):
        cpu.router_logits(x, weight.double(), None)


ROUTERS = {
    "softmax": Router("gate"),
    "softmax, renormalized": Router("gate", renormalize=True, scaling_factor=2.5),
    "sigmoid, renormalized": Router("gate", scoring="sigmoid", renormalize=True),
    "softmax of chosen": Router("gate", scoring="softmax_of_chosen"),
    "two best of groups": Router(
        "gate", scoring="sigmoid", groups=4, topk_groups=2, group_score="top2"
    ),
    "best of groups": Router("gate", groups=4, topk_groups=3, scaling_factor=16.0),
    "sparsemixer": Router("gate", scoring="sparsemixer", jitter=0.01),
}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (128, 1)])
def test_the_c_kernel_chooses_the_experts_of_the_reference(
    cpu: CpuLibrary, router: Router, corrected: bool, experts: int, top_k: int
) -> None:
    logits = 3 * torch.randn(67, experts, generator=torch.Generator().manual_seed(experts))
    correction = torch.linspace(-0.2, 0.2, experts) if corrected else None
    ids, weights = cpu.choose_experts(router, logits, top_k, correction)
    expected_ids, expected = reference.choose_experts(router, logits, top_k, correction)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    alone = [cpu.choose_experts(router, row[None], top_k, correction)[1] for row in logits]
    assert torch.equal(torch.cat(alone), weights)


def test_experts_are_chosen_by_logits_that_are_no_numbers_too(cpu: CpuLibrary) -> None:
    """Whatever comes of them, no expert is asked for that does not exist, or twice."""
    logits = torch.full((3, 8), torch.nan)
    logits[1, 5], logits[2] = 1.0, -torch.inf
    for router in list(ROUTERS.values())[:5]:
        ids, weights = cpu.choose_experts(router, logits, 3)
        assert all(len(set(row)) == 3 and set(row) <= set(range(8)) for row in ids.tolist())
        assert weights[0].isnan().all()
