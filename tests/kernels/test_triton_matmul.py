"""The Triton matmul computes the packed format's definition (interpreted, on the CPU)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.activation import ACTIVATIONS, Activation
from nybble.kernels.packed import E2M1_LEVELS, INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles
from nybble.kernels.triton import activation, matmul
from nybble.kernels.triton import dequantize as dense
from nybble.kernels.triton.configs import Config
from nybble.kernels.triton.dequantize import dense_matmul, dequantize, outputs_at_a_time
from nybble.kernels.triton.matmul import packed_matmul

CODEBOOK = torch.tensor(
    [-1, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1]
)
SMALL = Config(64, 16, 1, num_warps=4, num_stages=3, scale_first=False)
LARGE = Config(64, 32, 1, num_warps=4, num_stages=3, scale_first=True)
DENSE = Config(64, 16, 1, num_warps=4, num_stages=3, scale_first=True, dense=True)
PARTS = Config(16, 8, 1, num_warps=4, num_stages=3, scale_first=False, parts=4)
SPLIT = Config(64, 16, 3, num_warps=4, num_stages=3, scale_first=False)
TAIL = Config(64, 16, 2, num_warps=4, num_stages=3, scale_first=True, tail=1)
UNEQUAL = Config(64, 16, 2, num_warps=4, num_stages=3, scale_first=True, lead=0.7)


def random_weight(
    kind: str,
    out: int,
    columns: int,
    group: int,
    *,
    scale: torch.dtype = torch.float16,
    perm: bool = False,
    bias: bool = False,
    powers: bool = False,
) -> PackedWeight:
    """``kind``: symmetric, zeros (integers), fractional (negative ones too), codebook or e2m1.

    powers: scales are powers of two, so that scaling rounds nothing.
    """
    groups = -(-columns // group)
    zeros = None
    if kind == "zeros":
        zeros = torch.randint(0, 16, (out, groups)).to(scale)
    if kind == "fractional":
        zeros = (torch.rand(out, groups) * 24 - 4).to(scale)
    known = {"symmetric": SYMMETRIC_LEVELS, "codebook": CODEBOOK, "e2m1": E2M1_LEVELS}
    levels = known.get(kind, INTEGER_LEVELS)
    codes = torch.randint(0, 16, (out, columns)).to(torch.uint8)
    scales = torch.rand(out, groups) / 16 + 0.01
    if powers:
        scales = 2.0 ** scales.log2().round()
    weight = PackedWeight(
        qweight=pack_nibbles(codes),
        scales=scales.to(scale),
        zeros=zeros,
        levels=levels,
        out_features=out,
        in_features=columns,
        group_size=group,
        perm=torch.randperm(columns).int() if perm else None,
        bias=torch.randn(out).to(scale) if bias else None,
    )
    return weight.to_layout("gpu_tiles")


def error(x: torch.Tensor, weight: PackedWeight, config: Config | None) -> float:
    """Relative to the float64 product of what ``dequantize`` says the weight is."""
    expected = x.double() @ weight.dequantize().double().T
    if weight.bias is not None:
        expected += weight.bias.double()
    found = packed_matmul(x, weight, config).double()
    return float((found - expected).norm() / expected.norm())


# The interpreter truncates to bfloat16 where a GPU rounds to nearest.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "fractional", "codebook", "e2m1"])
@pytest.mark.parametrize(
    "group", [16, 256, *(pytest.param(group, marks=pytest.mark.slow) for group in (32, 64, 128))]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [SMALL, LARGE, PARTS])
def test_every_format_matches_its_dequantized_weight(
    kind: str, group: int, dtype: torch.dtype, config: Config
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 256).to(dtype)
    assert error(x, random_weight(kind, 64, 256, group), config) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("rows", "out", "columns"),
    [
        (17, 65, 129),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 1, 32), (5, 130, 200))),
    ],
)
@pytest.mark.parametrize("kind", ["zeros", pytest.param("codebook", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", [SMALL, LARGE, SPLIT, TAIL, UNEQUAL, PARTS])
def test_odd_sizes_are_masked(rows: int, out: int, columns: int, kind: str, config: Config) -> None:
    torch.manual_seed(1)
    x = torch.randn(rows, columns).half()
    for group in (16, 32):
        weight = random_weight(kind, out, columns, group, perm=True, bias=True)
        assert error(x, weight, config) < 1e-3


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float32])
def test_scales_may_be_wider_or_coarser_than_the_activations(scale: torch.dtype) -> None:
    torch.manual_seed(2)
    weight = random_weight("zeros", 64, 256, 64, scale=scale, bias=True)
    for config in (SMALL, LARGE, PARTS):
        assert error(torch.randn(2, 256).half(), weight, config) < 1e-3


@pytest.mark.parametrize("kind", ["symmetric", "codebook"])
@pytest.mark.parametrize("config", [SMALL, LARGE, PARTS])
def test_scales_may_be_exponents(kind: str, config: Config) -> None:
    """MXFP4's: the same result, bit for bit, as of the powers of two that they stand for."""
    torch.manual_seed(13)
    weight = random_weight(kind, 70, 200, 32, powers=True)
    as_exponents = (weight.scales.float().log2() + 127).to(torch.uint8)
    in_bytes = replace(weight, scales=as_exponents)
    x = torch.randn(5, 200).half()
    assert torch.equal(packed_matmul(x, in_bytes, config), packed_matmul(x, weight, config))
    assert torch.equal(dequantize(in_bytes, x.dtype), dequantize(weight, x.dtype))


def test_one_scale_for_a_whole_row_may_cover_any_number_of_columns() -> None:
    torch.manual_seed(3)
    assert error(torch.randn(2, 200).half(), random_weight("symmetric", 64, 200, 200), SMALL) < 1e-3


def test_split_columns_repeat_bit_for_bit_and_leave_the_counters_clean() -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(20, 900).half(), random_weight("symmetric", 128, 900, 64)
    once = packed_matmul(x, weight, SPLIT)
    assert torch.equal(packed_matmul(x, weight, SPLIT), once)
    assert error(x, weight, SPLIT) < 1e-3


class Recorded:
    """A kernel that notes its grid, and how many steps a part has, at each launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[int, int]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*values: Any, **constants: Any) -> None:
            given = dict(zip(self.kernel.arg_names, values, strict=False))
            self.launches.append((grid[0], given["steps_each"]))
            self.kernel[grid](*values, **constants)

        return launch


@pytest.mark.parametrize(
    ("kind", "scale_first"),
    [("fractional", True), pytest.param("codebook", False, marks=pytest.mark.slow)],
)
def test_two_parts_may_be_unequal(
    kind: str, scale_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(14)
    x, weight = torch.randn(17, 600).half(), random_weight(kind, 65, 600, 64, bias=True)
    unequal = replace(UNEQUAL, scale_first=scale_first)
    recorded = Recorded(matmul.matmul_kernel)
    monkeypatch.setattr(matmul, "matmul_kernel", recorded)
    once = packed_matmul(x, weight, unequal)
    assert torch.equal(packed_matmul(x, weight, unequal), once)
    assert error(x, weight, unequal) < 1e-3
    # Five steps, of which the first part has 70 %; four blocks.
    assert recorded.launches == [(8, 4)] * 3
    # The first to be done leaves its sum to the other, in either order.
    halves = packed_matmul(x, weight, replace(unequal, lead=0.5))
    assert torch.equal(halves, packed_matmul(x, weight, replace(unequal, lead=0.0)))
    # A share that leaves the second part nothing is no split, and is not counted.
    whole = packed_matmul(x, weight, replace(unequal, lead=1.0))
    assert torch.equal(whole, packed_matmul(x, weight, replace(unequal, splits=1, lead=0.0)))
    assert recorded.launches[-2:] == [(4, 5)] * 2
    # Only the last block of outputs is cut where a tail is, whatever the number of rows.
    found = packed_matmul(x, weight, replace(unequal, tail=1))
    assert recorded.launches[-1] == (6, 4)
    assert torch.equal(found[:, :64], whole[:, :64])
    assert torch.equal(found[:, 64:], once[:, 64:])
    assert matmul.arrivals(x.device).count_nonzero() == 0


@pytest.mark.parametrize("kind", ["fractional", "codebook"])
def test_elsewhere_than_on_hopper_a_step_is_four_products(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(9)
    x, weight = torch.randn(17, 200).half(), random_weight(kind, 130, 200, 32)
    on_hopper = packed_matmul(x, weight, LARGE)
    monkeypatch.setattr(matmul, "device_traits", lambda device: ("A GPU", 108, 80))
    assert error(x, weight, LARGE) < 1e-3
    torch.testing.assert_close(packed_matmul(x, weight, LARGE), on_hopper, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("lead", [0.0, 0.7])
def test_only_the_last_blocks_of_outputs_are_split_where_a_tail_is(lead: float) -> None:
    torch.manual_seed(8)
    config = replace(TAIL, lead=lead)
    x, weight = torch.randn(40, 1100).half(), random_weight("zeros", 200, 1100, 64, bias=True)
    assert error(x, weight, config) < 1e-3
    whole = packed_matmul(x, weight, replace(config, splits=1, tail=0, lead=0.0))
    everywhere = packed_matmul(x, weight, replace(config, tail=0))
    found = packed_matmul(x, weight, config)
    assert torch.equal(found[:, :192], whole[:, :192])
    assert torch.equal(found[:, 192:], everywhere[:, 192:])
    # Alone in its batch, a row is split as it was in company.
    assert torch.equal(packed_matmul(x[33:34], weight, config)[0], found[33])


@pytest.mark.parametrize("rows", [1, 40])
def test_groups_of_16_take_their_own_configuration(rows: int) -> None:
    """NVFP4's, and of GGUF's Q6_K: the rule's choice for other groups is not for them."""
    torch.manual_seed(12)
    x = torch.randn(rows, 300).half()
    for kind, scale in (("codebook", torch.float32), ("fractional", torch.float32)):
        weight = random_weight(kind, 130, 300, 16, scale=scale, bias=True)
        assert matmul.takes(weight, x.dtype)
        assert error(x, weight, None) < 1e-3


def test_leading_dimensions_and_empty_batches_keep_their_shape() -> None:
    torch.manual_seed(5)
    weight = random_weight("symmetric", 64, 128, 128)
    assert packed_matmul(torch.randn(2, 3, 128).half(), weight).shape == (2, 3, 64)
    assert packed_matmul(torch.randn(0, 128).half(), weight).shape == (0, 64)


@pytest.mark.parametrize("kind", ["symmetric", "fractional", "codebook"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dequantized_weight_is_the_format_rounded_once(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    for group in (16, 64):
        weight = random_weight(kind, 130, 200, group)
        found = dequantize(weight, dtype, 64).double()
        expected = weight.dequantize()[64:].double()
        assert (found - expected).norm() / expected.norm() < TOLERANCE[dtype] / 2


def test_many_rows_multiply_a_dequantized_weight_a_part_at_a_time() -> None:
    torch.manual_seed(7)
    x, weight = torch.randn(9, 200).half(), random_weight("zeros", 200, 200, 32, bias=True)
    assert weight.bias is not None
    expected = x.double() @ weight.dequantize().double().T + weight.bias.double()
    for workspace in (1, 1 << 20):
        found = dense_matmul(x, weight, workspace).double()
        assert (found - expected).norm() / expected.norm() < 1e-3
    assert torch.equal(packed_matmul(x, weight, DENSE), dense_matmul(x, weight))


@pytest.mark.parametrize(
    ("out", "columns"), [(27648, 5120), (37888, 3584), (28672, 4096), (22016, 4096)]
)
def test_gate_and_up_of_7b_and_13b_models_are_multiplied_in_one_piece(
    out: int, columns: int
) -> None:
    """Llama-2-13B's, Qwen2.5-7B's, Llama-3-8B's and Llama-2-7B's."""
    assert outputs_at_a_time(columns) >= out


@pytest.mark.parametrize("config", [SMALL, PARTS])
def test_more_elements_than_offsets_of_32_bits_reach_are_multiplied_densely(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was measured: of inputs and of outputs, in place of a wrong address."""
    x, weight = torch.randn(9, 200).half(), random_weight("zeros", 136, 200, 32)
    dense = packed_matmul(x, weight, DENSE)
    for most in (9 * 200, 9 * 200 - 1):
        monkeypatch.setattr(matmul, "MOST_ELEMENTS", most)
        found = packed_matmul(x, weight, config)
        assert torch.equal(found, dense) == (most < 9 * 200)
    wide = random_weight("zeros", 264, 200, 32)
    assert torch.equal(packed_matmul(x, wide, config), packed_matmul(x, wide, DENSE))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("symmetric", SPLIT),
        *(
            pytest.param(kind, config, marks=pytest.mark.slow)
            for kind in ("symmetric", "zeros", "codebook")
            for config in (SMALL, LARGE, SPLIT, TAIL, UNEQUAL, PARTS, DENSE)
        ),
    ],
)
def test_a_gate_and_what_it_multiplies_are_one_product_in_either_layout(
    kind: str, config: Config
) -> None:
    torch.manual_seed(10)
    # Sums that no order can change: the interpreter multiplies by BLAS, which has its own for every
    # place of a row.
    x = torch.randint(-1, 2, (19, 200)).half()
    plain = random_weight(kind, 208, 200, 32, perm=True, bias=True, powers=True)
    weight = plain.to_layout("gpu_gated_tiles")
    assert torch.equal(weight.dequantize(), plain.dequantize())
    both = packed_matmul(x, plain, config)
    assert torch.equal(packed_matmul(x, weight, config), both)
    # Not a bit differs from two launches: a row with an adapter takes two.
    for name in ACTIVATIONS:
        fused = packed_matmul(x, weight, config, name)
        assert torch.equal(fused, activation.gated(both, name)), name


def test_a_gated_weight_is_dequantized_a_part_at_a_time_in_the_order_of_its_outputs() -> None:
    torch.manual_seed(11)
    x, plain = torch.randn(5, 128).half(), random_weight("zeros", 208, 128, 64, bias=True)
    weight = plain.to_layout("gpu_gated_tiles")
    torch.testing.assert_close(dense_matmul(x, weight, 1), dense_matmul(x, plain))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_are_applied_to_each_part_so_that_the_whole_product_never_exists(
    name: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(12)
    x, plain = (torch.randn(5, 128) / 64).half(), random_weight("zeros", 208, 128, 64, bias=True)
    weight = plain.to_layout("gpu_gated_tiles")
    expected = activation.gated(dense_matmul(x, weight, 1), name)
    widths: list[int] = []
    gated = activation.gated

    def note(product: Tensor, *others: Any) -> Tensor:
        widths.append(product.shape[1])
        return gated(product, *others)

    monkeypatch.setattr(dense, "gated", note)
    assert torch.equal(dense_matmul(x, weight, 1, name), expected)
    assert widths == [64, 64, 64, 16]


def test_an_activation_of_a_weight_that_is_not_gated_is_refused() -> None:
    x, weight = torch.randn(1, 64).half(), random_weight("zeros", 32, 64, 32)
    with pytest.raises(ValueError, match="gelu of a weight in gpu_tiles, not gpu_gated_tiles"):
        packed_matmul(x, weight, activation="gelu")


def test_an_activation_that_does_not_exist_is_refused() -> None:
    weight = random_weight("zeros", 32, 64, 32).to_layout("gpu_gated_tiles")
    with pytest.raises(ValueError, match="'swish': expected one of silu, gelu, gelu_tanh, relu2"):
        packed_matmul(torch.randn(1, 64).half(), weight, activation="swish")  # type: ignore[arg-type]
