"""GGUF's blocks against gguf's own dequantization."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from nybble.loaders.formats.gguf_blocks import BLOCK_TYPES
from tests.loaders.gguf_files import HALVES, random_blocks


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_have_the_weights_that_gguf_gives_them(name: str) -> None:
    stored = random_blocks(name, 40, 1024)
    expected = torch.from_numpy(gguf.dequantize(stored, GGMLQuantizationType[name]))
    weight = BLOCK_TYPES[name].packed(torch.from_numpy(stored))
    if BLOCK_TYPES[name].is_rounded:
        # d · q + m against d · (q − z): the largest of d · q, m and z · d is rounded each time.
        magnitude = expected.abs().view(40, -1, BLOCK_TYPES[name].group).amax(-1, keepdim=True)
        error = (weight.dequantize() - expected).view(40, -1, BLOCK_TYPES[name].group).abs()
        assert (error <= magnitude * 2**-19).all()
    else:
        assert torch.equal(weight.dequantize(), expected)
    levels = weight.levels.nbytes
    assert weight.nbytes - levels == BLOCK_TYPES[name].packed_bytes(40, stored.shape[1])


def test_the_sizes_of_blocks_are_those_of_gguf() -> None:
    for name, block in BLOCK_TYPES.items():
        sizes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        assert (block.weights, block.nbytes) == sizes


def test_many_rows_are_unpacked_in_parts() -> None:
    stored = random_blocks("Q4_0", 5000, 32)
    expected = torch.from_numpy(gguf.dequantize(stored, GGMLQuantizationType.Q4_0))
    weight = BLOCK_TYPES["Q4_0"].packed(torch.from_numpy(stored))
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize(
    ("name", "scale"), [("Q8_0", 5000.0), ("Q4_0", float("inf")), ("Q6_K", float("nan"))]
)
def test_scales_that_cannot_be_kept_are_refused(name: str, scale: float) -> None:
    stored = random_blocks(name, 2, 256)
    at = HALVES[name][0]
    stored[0, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="a scale is not finite, or too large"):
        BLOCK_TYPES[name].packed(torch.from_numpy(stored))
