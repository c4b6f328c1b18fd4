"""Weights trained on the grid they are stored on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nybble.finetune.qat import (
    FakeQuantLinear,
    QatSettings,
    fake_quantize_model,
    quantization_aware_train,
)
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.quantizers import quantize_checkpoint
from nybble.quantizers.evaluate import evaluate
from nybble.quantizers.packed_model import load_packed_model
from nybble.quantizers.rtn import quantize_affine
from torch import nn
from transformers import AutoTokenizer

CPU = torch.device("cpu")
TEXT = "the quick brown fox jumps over the lazy dog and then the other dog barks at the moon"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("sym", [False, True])
def test_the_forward_pass_rounds_as_the_export_does(sym: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 24)
    layer = FakeQuantLinear(linear, 16, sym=sym)
    x = torch.randn(5, 64)
    exported = layer.export()
    plain = quantize_affine(linear.weight.detach(), 16, sym=sym)
    assert torch.equal(exported.dequantize(), plain.dequantize())
    expected = nn.functional.linear(x, exported.dequantize(), linear.bias)
    assert torch.equal(layer(x), expected)


def test_the_gradient_passes_within_the_range_and_not_beyond() -> None:
    torch.manual_seed(0)
    layer = FakeQuantLinear(nn.Linear(16, 8, bias=False), 16, sym=False)
    with torch.no_grad():
        layer.weight[0, 3] = 100.0  # moved out of the grid, which stays
        layer.weight[1, 4] = -100.0
    x = torch.randn(6, 16)
    layer(x).sum().backward()
    expected = x.sum(0).expand(8, 16).clone()
    expected[0, 3] = expected[1, 4] = 0
    torch.testing.assert_close(layer.weight.grad, expected)


def test_the_exported_model_is_the_trained_one_and_beats_rounding(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model()
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": TEXT[start:]}) for start in range(12)))
    from nybble.finetune import qat

    trained = []

    def remember(*args: object, **options: object) -> dict[str, FakeQuantLinear]:
        trained.append(args[0])
        return fake_quantize_model(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(qat, "fake_quantize_model", remember)
    losses = quantization_aware_train(
        source,
        data,
        tmp_path / "qat",
        settings=QatSettings(group_size=32, learning_rate=2e-3, steps=15, max_length=64),
        dtype=torch.float32,
        progress=False,
    )
    assert losses[-1] < 0.6 * losses[0]
    loaded = load_packed_model(open_checkpoint(tmp_path / "qat"), device=CPU, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(tokens).logits, trained[0].train(False)(tokens).logits, rtol=1e-4, atol=1e-4
        )
    quantize_checkpoint(source, tmp_path / "rtn", format="gptq", group_size=32, progress=False)
    _, rounded, ours = evaluate(
        source,
        {"rtn": tmp_path / "rtn", "qat": tmp_path / "qat"},
        tokens[0],
        length=64,
        progress=False,
    )
    assert ours.perplexity < 0.5 * rounded.perplexity
    assert ours.bits_per_weight == rounded.bits_per_weight


def test_a_quantized_base_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="gptq", group_size=32, progress=False)
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantization_aware_train(tmp_path / "q", tmp_path / "d", tmp_path / "out", progress=False)


def test_sizes_that_do_not_fit_are_named(tiny_model: Callable[..., Path]) -> None:
    model = load_packed_model(open_checkpoint(tiny_model()), device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: .* groups of 48"):
        fake_quantize_model(model, 48)
