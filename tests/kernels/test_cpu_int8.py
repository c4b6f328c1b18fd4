"""Products with activations in 8 bits are those of the reference, whatever the shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from nybble.kernels import PackedWeight, reference
from nybble.kernels.backend import backend_for
from nybble.kernels.cpu.build import ARM_TARGETS, TARGETS, Target, missing_cpu_features
from nybble.kernels.cpu.library import CpuLibrary
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles

from .cpu_kernels import AVX_VNNI_ENCODED, CODEBOOK, compiled, random_8_bit_weight, random_weight
from .test_cpu import SHAPES, Problem, assert_close

pytestmark = pytest.mark.usefixtures("two_threads")

# The others multiply only nibbles as bytes: they compute the rest with 16 bits.
LARGE_BYTES = "amx", "avx512_bf16", "avx512_vnni", "avx2_vnni"


@pytest.fixture(scope="module", params=(*TARGETS, *ARM_TARGETS), ids=lambda target: target.name)
def target(request: pytest.FixtureRequest) -> Target:
    compiled(request.param)
    found: Target = request.param
    return found


@pytest.fixture
def int8(target: Target) -> CpuLibrary:
    return compiled(target, 8)


def expected_of(x: Tensor, weight: PackedWeight, target: Target) -> Tensor:
    nibbles = bool((weight.levels.diff() == 1).all()) and not weight.has_two_digits
    if nibbles or target.name in LARGE_BYTES:
        return reference.packed_matmul_int8(x, weight)
    return reference.packed_matmul_int16(x, weight)


@given(**SHAPES)
@settings(max_examples=100, deadline=None)
def test_products_are_those_of_the_reference(target: Target, **shape: Any) -> None:
    problem = Problem.of(**shape)
    found = compiled(target, 8).packed_matmul(problem.x, problem.weight.to_layout("cpu_tiles"))
    assert_close(found, expected_of(problem.x, problem.weight, target), problem.magnitude)


@pytest.mark.parametrize("kind", ["asym", "sym", "codebook"])
def test_the_reference_errs_by_half_a_step_of_activations_and_levels(kind: str) -> None:
    torch.manual_seed(0)
    weight = random_weight(60, 256, 64, kind, torch.half, act_order=False, bias=False)
    x = torch.randn(7, 256).bfloat16()
    dense, wide = weight.dequantize().double(), x.double()
    largest = wide.view(7, 4, 64).abs().amax(-1, keepdim=True).expand(7, 4, 64).reshape(7, 256)
    step = (largest / 127) @ dense.abs().T / 2
    level = float(weight.levels.max() - weight.levels.min()) / 255 / 2
    scales = weight.scales.double().repeat_interleave(64, 1)
    levels = (wide.abs() + largest / 254) @ scales.T * (level if kind == "codebook" else 0)
    error = (reference.packed_matmul_int8(x, weight) - wide @ dense.T).abs()
    assert (error <= (step + levels) * 1.0001).all()
    assert error.max() > step.max() / 50, "nothing is rounded"


@pytest.mark.parametrize("zeros", [False, True])
def test_8_bit_weights(int8: CpuLibrary, target: Target, zeros: bool) -> None:
    torch.manual_seed(0)
    weight = random_8_bit_weight(90, 288, 144, torch.half, zeros=zeros, act_order=True, bias=True)
    for rows in (1, 5, 19):
        x = torch.randn(rows, 288).bfloat16()
        magnitude = x.double().abs().sum(1, keepdim=True) * 256
        found = int8.packed_matmul(x, weight.to_layout("cpu_tiles"))
        assert_close(found, expected_of(x, weight, target), magnitude.expand(rows, 90))


@pytest.mark.parametrize("kind", ["asym", "sym", "codebook", "8 bits"])
def test_a_row_does_not_depend_on_its_batch(int8: CpuLibrary, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "8 bits":
        weight = random_8_bit_weight(
            200, 288, 144, torch.half, zeros=True, act_order=False, bias=True
        )
    else:
        weight = random_weight(200, 288, 144, kind, torch.half, act_order=False, bias=True)
    weight = weight.to_layout("cpu_tiles")
    x = torch.randn(75, 288).bfloat16()
    together = int8.packed_matmul(x, weight)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 37):
        for start in range(0, len(x) - count + 1, max(count, 15)):
            rows = slice(start, start + count)
            assert torch.equal(int8.packed_matmul(x[rows], weight), together[rows])


def test_the_largest_sums_do_not_overflow(int8: CpuLibrary, target: Target) -> None:
    """Every activation the largest and alike, every level the largest of its sign."""
    for levels in (INTEGER_LEVELS, SYMMETRIC_LEVELS, CODEBOOK):
        for code in (0, 15):
            for sign in (1, -1):
                weight = PackedWeight(
                    qweight=pack_nibbles(torch.full((16, 256), code, dtype=torch.uint8)),
                    scales=torch.ones(16, 1),
                    zeros=None,
                    levels=levels,
                    out_features=16,
                    in_features=256,
                    group_size=256,
                )
                x = torch.full((20, 256), sign * 1.9921875).bfloat16()
                found = int8.packed_matmul(x, weight.to_layout("cpu_tiles"))
                exact = 256 * sign * 1.9921875 * levels[code].expand_as(found)
                torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_products_hide_nothing_that_is_not_a_number(int8: CpuLibrary, value: float) -> None:
    weight = random_weight(40, 256, 128, "sym", torch.half, act_order=False, bias=False)
    x = torch.randn(5, 256).bfloat16()
    expected = int8.packed_matmul(x, weight.to_layout("cpu_tiles"))
    x[-1, 7] = value
    found = int8.packed_matmul(x, weight.to_layout("cpu_tiles"))
    assert torch.equal(found[:-1], expected[:-1])
    assert not found[-1].isfinite().any()


@pytest.mark.parametrize("exponent", [-126, -120, 100, 118])
def test_activations_of_any_size_are_multiplied(int8: CpuLibrary, exponent: int) -> None:
    torch.manual_seed(0)
    weight = random_weight(40, 128, 64, "sym", torch.float32, act_order=False, bias=False)
    x = torch.ldexp(torch.randn(3, 128).bfloat16().float(), torch.tensor(exponent)).bfloat16()
    found = int8.packed_matmul(x, weight.to_layout("cpu_tiles"))
    expected = reference.packed_matmul_int8(x, weight)
    bound = expected.abs() * 2**-7 + x.double().abs().sum(1, keepdim=True) * 2**-17
    assert ((found.double() - expected).abs() <= bound + 2.0**-120).all()
    assert not int8.packed_matmul(
        torch.zeros(2, 128).bfloat16(), weight.to_layout("cpu_tiles")
    ).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asym", "codebook"])
def test_the_kernels_agree_to_the_bit(kind: str) -> None:
    """AVX-512, its VNNI, and AVX2: sums are exact, whatever the instructions."""
    targets = [each for each in TARGETS if kind != "codebook" or each.name in LARGE_BYTES]
    targets = [each for each in (*targets, AVX_VNNI_ENCODED) if not missing_cpu_features(each)]
    weight = random_weight(100, 300, 128, kind, torch.half, act_order=False, bias=True)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 300).bfloat16()
        first, *others = (
            compiled(each, 8).packed_matmul(x, weight.to_layout("cpu_tiles")) for each in targets
        )
        assert all(torch.equal(first, other) for other in others)


def test_experts_are_multiplied_alike(int8: CpuLibrary) -> None:
    torch.manual_seed(0)
    experts = [
        replace(
            random_weight(48, 64, 32, "sym", torch.half, act_order=True, bias=True),
            levels=SYMMETRIC_LEVELS,
        ).to_layout("cpu_tiles")
        for _ in range(3)
    ]
    x, ids = torch.randn(5, 64).bfloat16(), torch.tensor([[0], [2], [2], [0], [2]])
    found = int8.grouped_linear(experts, torch.bfloat16)(x, ids, None)
    for row, (expert,) in enumerate(ids.tolist()):
        assert torch.equal(found[row], int8.packed_matmul(x[row : row + 1], experts[expert]))


def test_where_it_cannot_be_computed_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activations are int8: .* the dtype float32"):
        backend_for(torch.device("cpu"), torch.float32, activations="int8")
    with pytest.raises(ValueError, match=r"activations are int8: .* the device is cuda"):
        backend_for(torch.device("cuda"), torch.bfloat16, activations="int8")
