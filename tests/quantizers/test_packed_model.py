"""transformers' model on packed weights: its outputs and gradients are the dequantized model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nybble.kernels import PackedWeight
from nybble.loaders import open_checkpoint
from nybble.quantizers import GptqSettings, quantize_checkpoint
from nybble.quantizers.packed_model import PackedLinear, load_packed_model, packed_linear

CPU = torch.device("cpu")


def calibration() -> torch.Tensor:
    return torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["gptq", "gptq desc_act", "awq", "nf4", "fp4"])
def quantized(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Callable[..., Path]
) -> Path:
    kind = request.param.split()[0]
    act_order = request.param != kind
    quantize_checkpoint(
        tiny_model(),
        tmp_path / "q",
        format=kind,
        group_size=32,
        calibration=calibration() if act_order else None,
        settings=GptqSettings(desc_act=True) if act_order else None,
        progress=False,
    )
    return tmp_path / "q"


def test_gradients_equal_those_through_the_dequantized_weight(quantized: Path) -> None:
    torch.manual_seed(0)
    for name, weight in open_checkpoint(quantized).weights():
        if not isinstance(weight, PackedWeight) or ".0." not in name:
            continue
        for layout in ("rows", "cpu_tiles"):
            x = torch.randn(3, 5, weight.in_features, requires_grad=True)
            upstream = torch.randn(3, 5, weight.out_features)
            out = packed_linear(x, weight.to_layout(layout))  # type: ignore[arg-type]
            (found,) = torch.autograd.grad(out, x, upstream)
            dense = torch.nn.functional.linear(
                x, weight.dequantize(), None if weight.bias is None else weight.bias.float()
            )
            (expected,) = torch.autograd.grad(dense, x, upstream)
            torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_in_bfloat16_is_near_the_one_in_full_precision(quantized: Path) -> None:
    torch.manual_seed(0)
    weights = dict(open_checkpoint(quantized).weights())
    weight = weights["model.layers.1.mlp.gate_up_proj"]
    assert isinstance(weight, PackedWeight)
    x = torch.randn(40, weight.in_features).bfloat16().requires_grad_()
    upstream = torch.randn(40, weight.out_features).bfloat16()
    (found,) = torch.autograd.grad(packed_linear(x, weight), x, upstream)
    expected = upstream.float() @ weight.dequantize()
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


def test_the_whole_model_equals_transformers_with_dequantized_weights(
    quantized: Path, tiny_model: Callable[..., Path]
) -> None:
    packed = load_packed_model(open_checkpoint(quantized), device=CPU, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    linears = [(n, m) for n, m in packed.named_modules() if isinstance(m, PackedLinear)]
    assert len(linears) == 14
    for name, module in linears:
        model.get_submodule(name).weight.data = module.packed.dequantize()
    assert not [name for name, parameter in packed.named_parameters() if parameter.requires_grad]
    tokens = calibration()[:2]
    with torch.no_grad():
        torch.testing.assert_close(
            packed(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("kind", ["untied", "tied", "said to be tied"])
def test_a_16_bit_checkpoint_is_transformers_own_model(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """An output layer of its own counts, whatever the config says of it."""
    folder = Path(shutil.copytree(tiny_model(tie_word_embeddings=kind == "tied"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = kind != "untied"
    (folder / "config.json").write_text(json.dumps(config))
    ours = load_packed_model(open_checkpoint(folder), device=CPU, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = calibration()[:2]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
