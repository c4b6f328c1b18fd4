"""Rounding while loading gives what a quantized checkpoint on disk would have given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import CheckpointError, open_checkpoint, save_packed
from nybble.quantizers import InFlight, quantize_checkpoint


def test_nf4_in_flight_equals_the_written_checkpoint(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    source = tiny_model()
    quantize_checkpoint(source, tmp_path / "nf4", format="nf4", progress=False)
    written = dict(open_checkpoint(tmp_path / "nf4").weights())
    checkpoint = InFlight(open_checkpoint(source), layers="nf4")
    assert checkpoint.format == "nf4"
    for name, weight in checkpoint.weights():
        expected = written[name]
        assert type(weight) is type(expected)
        if isinstance(weight, PackedWeight) and isinstance(expected, PackedWeight):
            assert torch.equal(weight.dequantize(), expected.dequantize())
            assert (weight.bias is None) == (expected.bias is None)


@pytest.mark.parametrize("tied", [False, True])
def test_an_8_bit_head_is_within_half_a_step_and_leaves_the_embeddings_alone(
    tiny_model: Callable[..., Path], tied: bool
) -> None:
    source = open_checkpoint(tiny_model(tie_word_embeddings=tied))
    original = dict(source.weights())
    weights = dict(InFlight(source, head="int8").weights())
    embedding = original["model.embed_tokens.weight"]
    assert isinstance(embedding, Tensor)
    head, before = weights["lm_head"], original.get("lm_head", embedding)
    dense = before.weight if isinstance(before, DenseWeight) else before
    assert isinstance(dense, Tensor)
    assert isinstance(head, PackedWeight)
    # A bfloat16 scale may be rounded down by 2⁻⁹, so the largest code can be cut by as much again.
    step = dense.float().abs().amax(1, keepdim=True) / 119
    assert ((head.dequantize() - dense.float()).abs() <= step * (0.5 + 119 * 2**-8)).all()
    unchanged = weights["model.embed_tokens.weight"]
    assert isinstance(unchanged, Tensor)
    assert torch.equal(unchanged, embedding)


def test_an_8_bit_head_survives_packing(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    checkpoint = InFlight(open_checkpoint(tiny_model(tie_word_embeddings=True)), head="int8")
    save_packed(checkpoint, tmp_path / "p", layout="cpu_tiles", progress=False)
    before = dict(checkpoint.weights())["lm_head"]
    after = dict(open_checkpoint(tmp_path / "p").weights())["lm_head"]
    assert isinstance(before, PackedWeight)
    assert isinstance(after, PackedWeight)
    assert torch.equal(before.dequantize(), after.dequantize())


def test_a_quantized_checkpoint_is_not_quantized_again(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="gptq", progress=False)
    with pytest.raises(CheckpointError, match=r"q is quantized already \(gptq\); only 16-bit"):
        dict(InFlight(open_checkpoint(tmp_path / "q"), layers="nf4").weights())
