"""The packed format means exactly what its definition says."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.kernels import PackedWeight
from nybble.kernels.packed import (
    E2M1_LEVELS,
    INT8_MAX,
    INTEGER_LEVELS,
    SYMMETRIC_LEVELS,
    pack_int8,
    pack_nibbles,
    stack_outputs,
    unpack_nibbles,
)
from nybble.kernels.reference import packed_matmul


def test_a_hand_computed_weight() -> None:
    weight = PackedWeight(
        qweight=torch.tensor([[0x21, 0x0F]], dtype=torch.uint8),  # codes 1, 2, 15
        scales=torch.tensor([[0.5, 2.0]], dtype=torch.float16),
        zeros=torch.tensor([[1.0, 8.5]], dtype=torch.float16),
        levels=INTEGER_LEVELS,
        out_features=1,
        in_features=3,
        group_size=2,
    )
    assert weight.dequantize().tolist() == [[0.0, 0.5, 13.0]]


def test_scales_may_be_exponents_of_powers_of_two() -> None:
    weight = PackedWeight(
        qweight=torch.tensor([[0xA9, 0xA9, 0x09]], dtype=torch.uint8),  # levels 1, 2, 1, 2, 1, −8
        scales=torch.tensor([[0, 127, 254]], dtype=torch.uint8),
        zeros=None,
        levels=SYMMETRIC_LEVELS,
        out_features=1,
        in_features=6,
        group_size=2,
    )
    expected = [2.0**-127, 2.0**-126, 1, 2, 2.0**127, -math.inf]
    assert weight.dequantize().tolist() == [expected]
    assert weight.to_layout("cpu_tiles").to_layout("rows").dequantize().tolist() == [expected]
    with pytest.raises(ValueError, match="scales which are exponents have no zeros"):
        replace(weight, zeros=torch.zeros(1, 3, dtype=torch.uint8))


def test_stored_columns_multiply_the_permuted_inputs() -> None:
    weight = PackedWeight(
        qweight=torch.tensor([[0xA9, 0x0B]], dtype=torch.uint8),  # levels 1, 2, 3
        scales=torch.ones(1, 1),
        zeros=None,
        levels=SYMMETRIC_LEVELS,
        out_features=1,
        in_features=3,
        group_size=3,
        perm=torch.tensor([2, 0, 1], dtype=torch.int32),
        bias=torch.tensor([100.0]),
    )
    assert weight.dequantize().tolist() == [[2.0, 3.0, 1.0]]
    assert packed_matmul(torch.tensor([[1.0, 10.0, 100.0]]), weight).tolist() == [[232.0]]


@given(rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 999))
def test_nibbles_survive_packing(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), columns), codes)


def test_a_wrong_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"scales shape is \(2, 3\), expected \(2, 2\)"):
        PackedWeight(
            qweight=torch.zeros(2, 4, dtype=torch.uint8),
            scales=torch.ones(2, 3),
            zeros=None,
            levels=SYMMETRIC_LEVELS,
            out_features=2,
            in_features=8,
            group_size=4,
        )


def random_weight(
    out: int, columns: int, group_size: int, *, zeros: bool, seed: int = 0
) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out, columns), generator=generator).to(torch.uint8)
    groups = -(-columns // group_size)
    return PackedWeight(
        qweight=pack_nibbles(codes),
        scales=torch.rand(out, groups, generator=generator).half(),
        zeros=torch.randint(0, 16, (out, groups), generator=generator).half() if zeros else None,
        levels=INTEGER_LEVELS if zeros else SYMMETRIC_LEVELS,
        out_features=out,
        in_features=columns,
        group_size=group_size,
    )


@given(
    out=st.integers(1, 40),
    columns=st.integers(1, 70),
    group=st.integers(1, 70),
    zeros=st.booleans(),
    levels=st.sampled_from([None, torch.rand(16), E2M1_LEVELS]),
)
def test_every_layout_holds_the_same_weight(
    out: int, columns: int, group: int, zeros: bool, levels: torch.Tensor | None
) -> None:
    weight = random_weight(out, columns, group, zeros=zeros)
    if levels is not None:
        weight = replace(weight, levels=levels)
    for layout in ("cpu_tiles", "gpu_tiles"):
        tiled = weight.to_layout(layout)  # type: ignore[arg-type]
        assert torch.equal(tiled.dequantize(), weight.dequantize())
        assert torch.equal(tiled.to_layout("rows").qweight, weight.qweight)


@given(eighths=st.integers(1, 9), columns=st.integers(1, 70), group=st.integers(1, 70))
def test_two_halves_take_turns_in_a_gated_tile_and_are_told_apart_again(
    eighths: int, columns: int, group: int
) -> None:
    weight = random_weight(16 * eighths, columns, group, zeros=True)
    tiled = weight.to_layout("gpu_gated_tiles")
    assert torch.equal(tiled.dequantize(), weight.dequantize())
    assert torch.equal(tiled.to_layout("cpu_tiles").dequantize(), weight.dequantize())
    assert torch.equal(tiled.rows(3, 11).dequantize(), weight.dequantize()[3:11])
    stored = weight.to_layout("gpu_tiles").scales.transpose(1, 2).flatten(0, 1)
    found = tiled.scales.transpose(1, 2).flatten(0, 1)
    assert torch.equal(found[8:16], stored[8 * eighths : 8 * eighths + 8])


def test_halves_of_an_odd_size_are_not_interleaved() -> None:
    with pytest.raises(ValueError, match="24 outputs are not a multiple of 16"):
        random_weight(24, 16, 8, zeros=False).to_layout("gpu_gated_tiles")


def test_a_cpu_tile_lane_holds_neighbouring_columns_in_its_two_halves() -> None:
    codes = torch.zeros(16, 8, dtype=torch.uint8)
    codes[3] = torch.arange(8)
    weight = random_weight(16, 8, 8, zeros=False)
    weight = replace(weight, qweight=pack_nibbles(codes)).to_layout("cpu_tiles")
    lane = weight.qweight.view(torch.int32)[0, 0, 3].item()
    assert [(lane >> 4 * s & 0xF, lane >> (16 + 4 * s) & 0xF) for s in range(4)] == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    ]


def test_outputs_sharing_an_input_become_one_weight() -> None:
    q, k = random_weight(5, 16, 8, zeros=True), random_weight(3, 16, 8, zeros=True, seed=1)
    both = stack_outputs([q, k])
    assert both is not None
    assert torch.equal(both.dequantize(), torch.cat([q.dequantize(), k.dequantize()]))
    assert stack_outputs([q, random_weight(3, 16, 4, zeros=True)]) is None


def test_an_8_bit_weight_is_two_planes_of_4_bit_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-INT8_MAX, INT8_MAX + 1, (5, 24), generator=generator)
    scales = torch.rand(5, 3, generator=generator).half()
    weight = pack_int8(codes.short(), scales, group_size=8)
    exact = codes.double() * scales.double().repeat_interleave(8, dim=1)
    assert torch.equal(weight.dequantize().double(), exact)
    assert weight.columns == 48
    x = torch.randn(2, 24, generator=generator)
    torch.testing.assert_close(packed_matmul(x, weight), (x.double() @ exact.T).float())
    assert torch.equal(weight.to_layout("cpu_tiles").dequantize(), weight.dequantize())


def test_an_8_bit_weight_is_known_by_its_digits() -> None:
    codes = torch.randint(-INT8_MAX, INT8_MAX + 1, (32, 256), dtype=torch.int16)
    weight = pack_int8(codes, torch.rand(32, 2).half(), 128)
    assert weight.perm is not None
    for layout in ("rows", "cpu_tiles", "gpu_tiles"):
        assert weight.to_layout(layout).has_two_digits  # type: ignore[arg-type]
    levels = torch.linspace(-1, 1, 16)
    for other in (
        replace(weight, perm=torch.arange(512).int() // 2),
        replace(weight, scales=weight.scales.roll(1, dims=1)),
        replace(weight, levels=levels),
        replace(weight, levels=INTEGER_LEVELS),
        random_weight(32, 512, 128, zeros=True),
        # Groups that hold digits of both kinds.
        replace(weight, group_size=512, scales=torch.ones(32, 1)),
    ):
        assert not other.has_two_digits
