"""The CPU kernels compute what the references do, whatever the shape."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.kernels import DenseWeight, PackedWeight, reference
from nybble.kernels.cpu.build import (
    ARM_TARGETS,
    TARGETS,
    Target,
    missing_cpu_features,
)
from nybble.kernels.cpu.huge_pages import empty_in_huge_pages
from nybble.kernels.cpu.library import CpuLibrary
from nybble.kernels.matmul import packed_matmul
from nybble.kernels.packed import (
    INT8_MAX,
    INTEGER_LEVELS,
    SYMMETRIC_LEVELS,
    pack_int8,
    pack_nibbles,
)
from nybble.loaders.formats.affine import two_digits

from .cpu_kernels import (
    AVX_VNNI_ENCODED,
    CODEBOOK,
    compiled,
    random_8_bit_weight,
    random_weight,
    transposed,
)

pytestmark = pytest.mark.usefixtures("two_threads")


BF16_TARGETS = [target for target in TARGETS if "avx512_bf16" in target.features]
INTEGER_TARGETS = [target for target in TARGETS if target not in BF16_TARGETS]


@pytest.fixture(scope="module", params=BF16_TARGETS, ids=lambda target: target.name)
def bf16_cpu(request: pytest.FixtureRequest) -> CpuLibrary:
    """The kernels that multiply bfloat16."""
    return compiled(request.param)


@pytest.fixture(
    scope="module", params=(*INTEGER_TARGETS, *ARM_TARGETS), ids=lambda target: target.name
)
def integer_cpu(request: pytest.FixtureRequest) -> CpuLibrary:
    """The kernels that multiply integers."""
    return compiled(request.param)


def assert_close(found: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """One rounding to bfloat16 (2⁻⁸ of the result) and float32 sums (2⁻²⁰ of their terms)."""
    error = (found.double() - exact).abs()
    bound = exact.abs() * 2**-8 + magnitude * 2**-20
    assert (error <= bound).all(), f"worst error {(error / bound).max():.2f} × the bound"


SHAPES = {
    "rows": st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 23, 31]),
    "out": st.integers(1, 150),
    "groups": st.integers(1, 4),
    "group": st.sampled_from([8, 16, 32, 64, 128, 136, 264]),
    "short": st.integers(0, 7),
    "kind": st.sampled_from(["asym", "sym", "codebook"]),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    "act_order": st.booleans(),
    "bias": st.booleans(),
    "seed": st.integers(0, 99),
}


@dataclass
class Problem:
    """Activations, a weight, what the product is exactly, and the size of what is added for it."""

    x: Tensor
    weight: PackedWeight
    exact: Tensor
    magnitude: Tensor

    @classmethod
    def of(
        cls,
        rows: int,
        out: int,
        groups: int,
        group: int,
        short: int,
        kind: str,
        dtype: torch.dtype,
        act_order: bool,
        bias: bool,
        seed: int,
    ) -> Problem:
        torch.manual_seed(seed)
        columns = groups * group - short
        weight = random_weight(out, columns, group, kind, dtype, act_order=act_order, bias=bias)
        return cls.with_weight(rows, weight, 32 if kind == "asym" else None)

    @classmethod
    def with_weight(cls, rows: int, weight: PackedWeight, spread: int | None) -> Problem:
        """spread: scales by which the terms of one weight may be apart before they cancel."""
        columns = weight.in_features
        # Activations of models: a few columns are far larger than the others.
        x = (torch.randn(rows, columns) * 2.0 ** torch.randint(-4, 3, (columns,))).bfloat16()
        dense = weight.dequantize().double()
        exact = x.double() @ dense.T
        # The terms actually added: a code's and its zero's separately, before they cancel.
        apart = dense.abs().max() if spread is None else spread * weight.scales.double().max()
        magnitude = (x.double().abs().sum(1, keepdim=True) * apart).expand_as(exact)
        if weight.bias is not None:
            exact += weight.bias.double()
        return cls(x, weight, exact, magnitude)


@given(**SHAPES)
@settings(max_examples=100, deadline=None)
def test_matmul(bf16_cpu: CpuLibrary, **shape: Any) -> None:
    problem = Problem.of(**shape)
    found = bf16_cpu.packed_matmul(problem.x, problem.weight.to_layout("cpu_tiles"))
    assert_close(found, problem.exact, problem.magnitude)


EXPONENTS = {"kind": st.sampled_from(["sym", "codebook"]), "dtype": st.just(torch.uint8)}


@given(**SHAPES | EXPONENTS)
@settings(max_examples=30, deadline=None)
def test_matmul_of_scales_which_are_exponents(bf16_cpu: CpuLibrary, **shape: Any) -> None:
    problem = Problem.of(**shape)
    found = bf16_cpu.packed_matmul(problem.x, problem.weight.to_layout("cpu_tiles"))
    assert_close(found, problem.exact, problem.magnitude)


BYTE_SHAPES = {
    "rows": st.sampled_from([1, 2, 3, 5, 8, 9, 10, 11, 12, 13, 23]),
    "out": st.integers(1, 150),
    "groups": st.integers(1, 4),
    "group": st.sampled_from([8, 16, 64, 128, 136, 264]),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    "zeros": st.booleans(),
    "act_order": st.booleans(),
    "bias": st.booleans(),
    "seed": st.integers(0, 99),
}


def byte_problem(
    rows: int,
    out: int,
    groups: int,
    group: int,
    dtype: torch.dtype,
    zeros: bool,
    act_order: bool,
    bias: bool,
    seed: int,
) -> Problem:
    torch.manual_seed(seed)
    weight = random_8_bit_weight(
        out, groups * group, group, dtype, zeros=zeros, act_order=act_order, bias=bias
    )
    assert weight.has_two_digits
    # The scales of high digits are 16 times as large.
    return Problem.with_weight(rows, weight, 32 if zeros else None)


@given(**BYTE_SHAPES)
@settings(max_examples=100, deadline=None)
def test_8_bit_weights_are_multiplied_in_one_pass(bf16_cpu: CpuLibrary, **shape: Any) -> None:
    problem = byte_problem(**shape)
    found = bf16_cpu.packed_matmul(problem.x, problem.weight.to_layout("cpu_tiles"))
    assert_close(found, problem.exact, problem.magnitude)


@given(**BYTE_SHAPES)
@settings(max_examples=100, deadline=None)
def test_8_bit_weights_in_integers_err_by_the_rounding_of_activations_alone(
    integer_cpu: CpuLibrary, **shape: Any
) -> None:
    problem = byte_problem(**shape)
    found = integer_cpu.packed_matmul(problem.x, problem.weight.to_layout("cpu_tiles"))
    rounded = reference.packed_matmul_int16(problem.x, problem.weight)
    assert_close(found, rounded, problem.magnitude)


def test_every_8_bit_code_is_multiplied_exactly(cpu: CpuLibrary) -> None:
    """One column is 1: the outputs are its codes, less the zero."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    for zero in (0, 9, 136, 255):
        digits, scales, zeros, perm = two_digits(
            codes, torch.ones(256, 1), torch.full((256, 1), float(zero))
        )
        weight = PackedWeight(
            qweight=pack_nibbles(digits),
            scales=scales,
            zeros=zeros,
            levels=INTEGER_LEVELS,
            out_features=256,
            in_features=8,
            group_size=8,
            perm=perm,
        )
        assert weight.has_two_digits
        for rows in (1, 8, 20):
            for column in range(8):
                x = torch.zeros(rows, 8).bfloat16()
                x[:, column] = 1
                found = cpu.packed_matmul(x, weight.to_layout("cpu_tiles"))
                assert torch.equal(found.float(), (codes[:, 0].float() - zero).expand(rows, 256))


@given(**SHAPES)
@settings(max_examples=100, deadline=None)
def test_matmul_in_integers_errs_by_the_rounding_of_activations_and_levels_alone(
    integer_cpu: CpuLibrary, **shape: Any
) -> None:
    problem = Problem.of(**shape)
    weight = problem.weight
    found = integer_cpu.packed_matmul(problem.x, weight.to_layout("cpu_tiles"))
    rounded = reference.packed_matmul_int16(problem.x, weight)
    assert_close(found, rounded, problem.magnitude)
    # Half a step for each activation, of which 2¹⁴ (2¹³) steps are the largest or more.
    bits, unit = (14, 1 / (2 * 2047)) if shape["kind"] == "codebook" else (15, 0.0)
    x = problem.x.double()
    x = x if weight.perm is None else x[:, weight.perm]
    stored = replace(weight, perm=None, in_features=weight.columns).dequantize().double()
    largest, scales = unit * float(weight.levels.abs().max()), weight.scales.double()
    bound = torch.zeros_like(problem.exact)
    for index, start in enumerate(range(0, weight.columns, weight.group_size)):
        part = slice(start, start + weight.group_size)
        step = x[:, part].abs().amax(1, keepdim=True) * 2.0**-bits
        off = largest * scales[:, index]
        weights = stored[:, part].abs().sum(1) + off * x[:, part].shape[1]
        bound += step * weights + x[:, part].abs().sum(1, keepdim=True) * off
    assert ((rounded - problem.exact).abs() <= bound * 1.001).all()


@given(
    out=st.integers(1, 70),
    groups=st.integers(1, 5),
    group=st.sampled_from([8, 16, 24, 64, 128]),
    short=st.integers(0, 7),
    kind=st.sampled_from(["asym", "sym", "codebook"]),
    scales=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    act_order=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_dequantizing_is_the_definition_to_the_bit(
    cpu: CpuLibrary,
    out: int,
    groups: int,
    group: int,
    short: int,
    kind: str,
    scales: torch.dtype,
    act_order: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    columns = groups * group - short
    weight = random_weight(out, columns, group, kind, scales, act_order=act_order, bias=False)
    # Of either sign, and from 1 down to subnormal numbers in bfloat16 and float32.
    wide = weight.scales.float() - 0.5
    tiny = wide * 2.0 ** torch.randint(-125, 1, wide.shape)
    weight = replace(weight, scales=(wide if scales == torch.float16 else tiny).to(scales))
    assert_same_bits(cpu.dequantize(weight.to_layout("cpu_tiles"), dtype), weight.dequantize(dtype))


def test_dequantizing_scales_of_every_exponent(cpu: CpuLibrary) -> None:
    torch.manual_seed(0)
    weight = random_weight(17, 120, 8, "sym", torch.uint8, act_order=False, bias=False)
    weight = replace(
        weight, scales=torch.arange(17 * 15).to(torch.uint8).clamp(max=254).view(17, 15)
    )
    for dtype in (torch.bfloat16, torch.float32):
        found = cpu.dequantize(weight.to_layout("cpu_tiles"), dtype)
        assert_same_bits(found, weight.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantizing_adds_the_planes_of_an_8_bit_weight(
    cpu: CpuLibrary, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-INT8_MAX, INT8_MAX + 1, (37, 72), dtype=torch.int16)
    weight = pack_int8(codes, torch.rand(37, 3).half(), 24)
    assert_same_bits(cpu.dequantize(weight.to_layout("cpu_tiles"), dtype), weight.dequantize(dtype))


def test_a_part_of_the_rows_is_dequantized_alone(cpu: CpuLibrary) -> None:
    torch.manual_seed(0)
    weight = random_weight(
        150, 100, 32, "asym", torch.float16, act_order=True, bias=True
    ).to_layout("cpu_tiles")
    for start, stop in ((0, 32), (48, 99), (144, 200)):
        part = cpu.dequantize(weight.rows(start, stop), torch.bfloat16)
        assert_same_bits(part, weight.dequantize(torch.bfloat16)[start:stop])


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal, and zeros of the same sign."""
    assert found.dtype == expected.dtype
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits), expected.contiguous().view(bits))


@pytest.mark.parametrize("kind", ["asym", "sym", "codebook", "8 bits", "8 bits, zeros"])
def test_a_row_does_not_depend_on_its_batch(cpu: CpuLibrary, kind: str) -> None:
    """To the bit, whether the rows are those of a decode step or of prompts."""
    if kind.startswith("8"):
        weight = random_8_bit_weight(
            200, 288, 144, torch.float16, zeros="zeros" in kind, act_order=False, bias=True
        )
    else:
        weight = random_weight(200, 288, 144, kind, torch.float16, act_order=False, bias=True)
    weight = weight.to_layout("cpu_tiles")
    x = torch.randn(300, 288).bfloat16()
    together = cpu.packed_matmul(x, weight)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 37, 256, 257):
        for start in range(0, len(x) - count + 1, max(count, 30)):
            rows = slice(start, start + count)
            assert torch.equal(cpu.packed_matmul(x[rows], weight), together[rows])


def test_many_outputs_are_those_of_the_weights_parts(cpu: CpuLibrary) -> None:
    """Of few rows, whose tasks are larger then."""
    weight = random_weight(4217, 64, 32, "asym", torch.float16, act_order=False, bias=True)
    whole, *parts = (
        each.to_layout("cpu_tiles")
        for each in (weight, weight.rows(0, 1600), weight.rows(1600, 4217))
    )
    for rows in (1, 3):
        x = torch.randn(rows, 64).bfloat16()
        expected = torch.cat([cpu.packed_matmul(x, part) for part in parts], dim=1)
        assert torch.equal(cpu.packed_matmul(x, whole), expected)


@pytest.mark.parametrize("exponent", [-100, -118, -124, -130])
def test_nor_does_a_row_whose_products_are_no_normal_floats(cpu: CpuLibrary, exponent: int) -> None:
    torch.manual_seed(0)
    weight = random_weight(40, 288, 144, "asym", torch.float32, act_order=False, bias=False)
    weight = weight.to_layout("cpu_tiles")
    x = torch.ldexp(torch.randn(20, 288), torch.tensor(exponent)).bfloat16()
    together = cpu.packed_matmul(x, weight)
    for row in range(20):
        assert torch.equal(cpu.packed_matmul(x[row : row + 1], weight), together[row : row + 1])


@pytest.mark.slow
def test_integer_kernels_agree_to_the_bit() -> None:
    """The sums of spans are exact, so that they do not depend on the instructions."""
    targets = (*INTEGER_TARGETS, AVX_VNNI_ENCODED)
    targets = tuple(each for each in targets if not missing_cpu_features(each))
    assert_agree([compiled(target) for target in targets])


@pytest.mark.parametrize("target", ARM_TARGETS, ids=lambda target: target.name)
def test_integer_kernels_of_arm_agree_with_those_of_x86_to_the_bit(target: Target) -> None:
    assert_agree([compiled(TARGETS[-1]), compiled(target)])


def assert_agree(libraries: list[CpuLibrary]) -> None:
    torch.manual_seed(0)
    byte_codes = random_8_bit_weight(
        100, 288, 96, torch.float16, zeros=True, act_order=False, bias=True
    )
    nibbles = (
        random_weight(100, 300, 128, kind, torch.float16, act_order=False, bias=True)
        for kind in ("asym", "codebook")
    )
    for weight in (byte_codes, *nibbles):
        tiled = weight.to_layout("cpu_tiles")
        for rows in (1, 2, 3, 8, 20):
            x = torch.randn(rows, weight.in_features).bfloat16()
            first, *others = (library.packed_matmul(x, tiled) for library in libraries)
            assert all(torch.equal(other, first) for other in others)


def test_the_largest_sums_of_integers_do_not_overflow(integer_cpu: CpuLibrary) -> None:
    """Every activation the largest and alike, every level the largest of its sign."""
    for levels in (INTEGER_LEVELS, SYMMETRIC_LEVELS, CODEBOOK):
        for code in (0, 15):
            weight = PackedWeight(
                qweight=torch.full((16, 128), code * 17, dtype=torch.uint8),
                scales=torch.ones(16, 1),
                zeros=None,
                levels=levels,
                out_features=16,
                in_features=256,
                group_size=256,
            )
            x = torch.full((20, 256), 1.9921875).bfloat16()
            found = integer_cpu.packed_matmul(x, weight.to_layout("cpu_tiles"))
            exact = 256 * 1.9921875 * levels[code].expand_as(found)
            torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=0)
    for code in (-INT8_MAX, INT8_MAX):
        codes = torch.full((16, 256), code, dtype=torch.int16)
        weight = pack_int8(codes, torch.ones(16, 1), 256).to_layout("cpu_tiles")
        found = integer_cpu.packed_matmul(x, weight)
        exact = torch.full((20, 16), 256 * 1.9921875 * code)
        torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_products_hide_nothing_that_is_not_a_number(cpu: CpuLibrary, value: float) -> None:
    weight = random_weight(40, 256, 128, "sym", torch.float16, act_order=False, bias=False)
    weight = weight.to_layout("cpu_tiles")
    for rows in (1, 4, 20):
        x = torch.randn(rows, 256).bfloat16()
        expected = cpu.packed_matmul(x, weight)
        x[-1, 131] = value
        found = cpu.packed_matmul(x, weight)
        assert torch.equal(found[:-1], expected[:-1])
        # A weight of exactly zero times infinity is not a number either.
        assert not found[-1].isfinite().any()


@pytest.mark.parametrize("exponent", [-126, -120, 100, 118])
def test_activations_of_any_size_are_multiplied(integer_cpu: CpuLibrary, exponent: int) -> None:
    torch.manual_seed(0)
    weight = random_weight(40, 128, 64, "sym", torch.float32, act_order=False, bias=False)
    x = torch.ldexp(torch.randn(3, 128).bfloat16().float(), torch.tensor(exponent)).bfloat16()
    found = integer_cpu.packed_matmul(x, weight.to_layout("cpu_tiles"))
    expected = reference.packed_matmul_int16(x, weight)
    bound = expected.abs() * 2**-7 + x.double().abs().sum(1, keepdim=True) * 2**-17
    assert ((found.double() - expected).abs() <= bound + 2.0**-126).all()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_the_product_with_its_weight(
    cpu: CpuLibrary, act_order: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    weight = random_weight(72, 48, 16, "asym", torch.float16, act_order=act_order, bias=bias)
    packed = weight.to_layout("cpu_tiles")
    linear = cpu.linear(packed, torch.bfloat16)
    x = torch.randn(6, 48).bfloat16()
    expected = cpu.packed_matmul(x, packed)
    assert expected.any()
    inputs = x, x.view(2, 3, 48), x[0], torch.cat([x, x], dim=1)[:, :48], x[:0]
    for rows in inputs:
        assert torch.equal(linear(rows), expected[: rows.numel() // 48].view(*rows.shape[:-1], 72))
    with pytest.raises(ValueError, match="take \\(…, 48\\)"):
        linear(x[:, :40])


def test_other_dtypes_and_layouts_are_computed_without_the_kernel() -> None:
    torch.manual_seed(0)
    weight = random_weight(40, 30, 6, "asym", torch.float16, act_order=True, bias=True)
    x = torch.randn(3, 30)
    expected = x.double() @ weight.dequantize().double().T + weight.bias.double()  # type: ignore[union-attr]
    for layout in ("rows", "cpu_tiles"):
        found = packed_matmul(x, weight.to_layout(layout))  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_dense_weights_are_multiplied_with_few_numbers_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = DenseWeight(torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16())
    linear = reference.linear(weight, torch.bfloat16)
    computed: set[int] = set()
    compute = torch.nn.functional.linear

    def spy(x: Tensor, *others: Tensor) -> Tensor:
        computed.add(x.shape[0])
        return compute(x, *others)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    for rows in range(301):
        x = torch.randn(rows, 64).bfloat16()
        found = linear(x)
        assert weight.bias is not None
        expected = x.double() @ weight.weight.double().T + weight.bias.double()
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
        assert rows <= reference.rows_computed(rows) <= 1.5 * rows + 0.5
    assert len(computed) <= 18  # each costs half a MiB, for each shape of weight
    assert 1 not in computed  # one row is summed in another order than several
    assert linear(torch.randn(2, 5, 64).bfloat16()).shape == (2, 5, 48)


def test_a_group_may_be_far_larger_than_the_weight(cpu: CpuLibrary) -> None:
    weight = random_weight(20, 40, 10**15, "sym", torch.float16, act_order=False, bias=False)
    usual = replace(weight, group_size=40).to_layout("cpu_tiles")
    x = torch.randn(8, 40).bfloat16()
    found = cpu.packed_matmul(x, weight.to_layout("cpu_tiles"))
    assert torch.equal(found, cpu.packed_matmul(x, usual))


def test_a_weight_with_gaps_is_not_taken(cpu: CpuLibrary) -> None:
    weight = random_weight(20, 64, 32, "sym", torch.float16, act_order=False, bias=False)
    tiled = weight.to_layout("cpu_tiles")
    assert cpu.takes(tiled)
    assert not cpu.takes(replace(tiled, scales=transposed(tiled.scales)))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux alone has huge pages")
def test_memory_asks_for_huge_pages() -> None:
    """Whether it gets any is the system's affair; small memory is left alone."""
    assert empty_in_huge_pages((3,), torch.float32).shape == (3,)
    made = empty_in_huge_pages((8 << 20,), torch.int8).zero_()
    middle = made.data_ptr() + made.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        if inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    raise AssertionError("the memory is not mapped")
