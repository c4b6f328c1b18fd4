"""The packed format means exactly what its definition says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nybble.kernels import PackedWeight
from nybble.kernels.packed import (
    INTEGER_LEVELS,
    SYMMETRIC_LEVELS,
    pack_nibbles,
    unpack_nibbles,
)
from nybble.kernels.reference import packed_matmul


def test_a_hand_computed_weight() -> None:
    weight = PackedWeight(
        qweight=torch.tensor([[0x21, 0x0F]], dtype=torch.uint8),  # codes 1, 2, 15
        scales=torch.tensor([[0.5, 2.0]], dtype=torch.float16),
        zeros=torch.tensor([[1.0, 8.5]], dtype=torch.float16),
        levels=INTEGER_LEVELS,
        in_features=3,
        group_size=2,
    )
    assert weight.dequantize().tolist() == [[0.0, 0.5, 13.0]]


def test_stored_columns_multiply_the_permuted_inputs() -> None:
    weight = PackedWeight(
        qweight=torch.tensor([[0xA9, 0x0B]], dtype=torch.uint8),  # levels 1, 2, 3
        scales=torch.ones(1, 1),
        zeros=None,
        levels=SYMMETRIC_LEVELS,
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
            in_features=8,
            group_size=4,
        )
