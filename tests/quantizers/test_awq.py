"""AWQ's scales leave the model as it was, its search lowers the error, its layout is standard."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nybble.kernels import PackedWeight
from nybble.loaders import open_checkpoint
from nybble.loaders.shards import Shards
from nybble.quantizers import quantize_checkpoint
from nybble.quantizers.awq import scale_block, search_clip, search_common_scale, search_scale
from nybble.quantizers.layers import (
    DecoderLayers,
    InputStatistics,
    linear_layer,
    output_error,
)
from nybble.quantizers.rtn import quantize_affine


def outlier_inputs(tokens: int, columns: int) -> Tensor:
    x = torch.randn(tokens, columns)
    x[:, ::16] *= 20  # a few channels carry most of the power, as in language models
    return x


def statistics_of(x: Tensor) -> InputStatistics:
    return InputStatistics(x.T @ x / len(x), x.abs().mean(0), len(x))


def rounding_error(weight: Tensor, scale: Tensor, x: Tensor) -> float:
    rounded = quantize_affine(weight * scale, 32, sym=False).dequantize() / scale
    return float(((rounded - weight) @ x.T).square().sum())


def test_the_searched_scale_is_the_best_of_the_grid_on_the_outputs() -> None:
    torch.manual_seed(0)
    x, weight = outlier_inputs(256, 64), torch.randn(48, 64)
    found = search_scale(weight, statistics_of(x), 32)
    candidates = [x.abs().mean(0) ** (step / 20) for step in range(20)]
    candidates = [scale / (scale.max() * scale.min()).sqrt() for scale in candidates]
    errors = [rounding_error(weight, scale, x) for scale in candidates]
    assert rounding_error(weight, found, x) == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.7 * errors[0]  # the first scales nothing


def test_layers_that_share_an_input_are_scaled_by_what_they_lead_to(
    tiny_model: Callable[..., Path],
) -> None:
    """The best of the grid by the MLP's output, as the block itself computes it."""
    blocks = DecoderLayers(tiny_model(), torch.device("cpu"), 64)
    torch.manual_seed(0)
    hidden = blocks.embed(calibration()).float() * torch.rand(128).mul(3).exp()
    block = blocks.load(0).float()
    names = ("mlp.gate_proj", "mlp.up_proj")
    layers = [linear_layer(block, name) for name in names]
    originals = [layer.weight.data.clone() for layer in layers]
    mean_abs = blocks.statistics(block, hidden, names[:1])[names[0]].mean_abs
    compute = blocks.module_outputs(block, hidden, ("mlp",))["mlp"]
    found = search_common_scale(layers, mean_abs, 32, compute)
    assert all(torch.equal(a.weight, b) for a, b in zip(layers, originals, strict=True))

    before = blocks.outputs(block, hidden)

    def error(scale: Tensor) -> float:
        for layer, weight in zip(layers, originals, strict=True):
            layer.weight.data = quantize_affine(weight * scale, 32, sym=False).dequantize() / scale
        return float((blocks.outputs(block, hidden) - before)[:, 1:].square().mean())

    candidates = [mean_abs ** (step / 20) for step in range(20)]
    candidates = [scale / (scale.max() * scale.min()).sqrt() for scale in candidates]
    errors = [error(scale) for scale in candidates]
    assert error(found) == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.9 * errors[0]


def test_clipping_never_makes_a_group_worse() -> None:
    torch.manual_seed(1)
    x, weight = outlier_inputs(256, 64), torch.randn(40, 64)
    weight[:, 5] *= 6
    moment = x.T @ x / len(x)
    clipped = search_clip(weight, moment, 32)
    rounded = quantize_affine(clipped, 32, sym=False).dequantize()
    plain = quantize_affine(weight, 32, sym=False).dequantize()
    for start in (0, 32):
        group = slice(start, start + 32)
        block = moment[group, group]

        def errors(approximate: Tensor, group: slice = group, block: Tensor = block) -> Tensor:
            difference = (approximate - weight)[:, group]
            return ((difference @ block) * difference).sum(1)

        assert (errors(rounded) <= errors(plain) * 1.0001).all()
        assert errors(rounded).sum() < 0.99 * errors(plain).sum()


def calibration() -> Tensor:
    return torch.randint(0, 300, (16, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_folding_leaves_the_block_as_it_was_in_full_precision(
    tiny_model: Callable[..., Path], family: str
) -> None:
    blocks = DecoderLayers(tiny_model(family=family), torch.device("cpu"), 64)
    # Outlier channels, so that the scales are far from 1.
    torch.manual_seed(0)
    hidden = blocks.embed(calibration()).float() * torch.rand(128).mul(3).exp()
    block = blocks.load(0).float()
    before = blocks.outputs(block, hidden)
    statistics = blocks.statistics(block, hidden, [g.linears[0].name for g in blocks.groups(0)])
    outputs = blocks.module_outputs(block, hidden, ("self_attn", "mlp"))
    scaled = scale_block(block, blocks.architecture.layers[0], statistics, outputs, 32)
    changes = []
    for name, (weight, _) in scaled.items():
        layer = linear_layer(block, name)
        changes.append((weight / layer.weight).max())
        layer.weight.data = weight
    assert max(changes) > 1.2  # it did scale
    torch.testing.assert_close(blocks.outputs(block, hidden), before, rtol=1e-4, atol=1e-4)


def test_rounding_the_folded_norm_to_16_bits_is_made_up_for(
    tiny_model: Callable[..., Path],
) -> None:
    """norm · weight is the same product as before, though the norm's weight is bfloat16."""
    blocks = DecoderLayers(tiny_model(), torch.device("cpu"), 64)
    hidden = blocks.embed(calibration())
    block = blocks.load(0)
    norm, layer = block.get_submodule("input_layernorm"), linear_layer(block, "self_attn.q_proj")
    before = layer.weight.float() * norm.weight.float()
    statistics = blocks.statistics(block, hidden, [g.linears[0].name for g in blocks.groups(0)])
    outputs = blocks.module_outputs(block, hidden, ("self_attn", "mlp"))
    scaled = scale_block(block, blocks.architecture.layers[0], statistics, outputs, 32)
    assert norm.weight.dtype == torch.bfloat16
    after = scaled["self_attn.q_proj"][0] * norm.weight.float()
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def with_salient_channels(model: Path, folder: Path) -> Path:
    """The model with a few large channels behind its norms, as language models have."""
    shutil.copytree(model, folder / "salient")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers." in name and "norm" in name:
            tensor[::16] = 8
    save_file(tensors, folder / "salient/model.safetensors", {"format": "pt"})
    return folder / "salient"


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_the_checkpoint_is_a_standard_one_that_differs_less_than_by_rounding(
    tmp_path: Path, tiny_model: Callable[..., Path], family: str
) -> None:
    """Logits of the whole model, its dequantized weights in transformers' own module."""
    source, tokens = with_salient_channels(tiny_model(family=family), tmp_path), calibration()

    def logits(folder: Path) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        shards, weights = Shards(folder), dict(open_checkpoint(folder).weights())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in shards:
                    parameter.copy_(shards.read(name))
            for index, layer in enumerate(model.model.layers):
                prefix = f"model.layers.{index}."
                attention, mlp = layer.self_attn, layer.mlp
                for fused, owners in (
                    ("self_attn.qkv_proj", (attention.q_proj, attention.k_proj, attention.v_proj)),
                    ("self_attn.o_proj", (attention.o_proj,)),
                    ("mlp.gate_up_proj", (mlp.gate_proj, mlp.up_proj)),
                    ("mlp.down_proj", (mlp.down_proj,)),
                ):
                    packed = weights[prefix + fused]
                    assert isinstance(packed, PackedWeight)
                    sizes = [owner.out_features for owner in owners]
                    for owner, part in zip(owners, packed.dequantize().split(sizes), strict=True):
                        owner.weight.copy_(part)
            result: Tensor = model(tokens[:4]).logits
        return result

    quantize_checkpoint(
        source,
        tmp_path / "awq",
        format="awq",
        group_size=32,
        calibration=tokens,
        progress=False,
    )
    quantize_checkpoint(source, tmp_path / "rtn", format="awq", group_size=32, progress=False)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        exact = model(tokens[:4]).logits
    ours = (logits(tmp_path / "awq") - exact).square().mean()
    assert ours < 0.9 * (logits(tmp_path / "rtn") - exact).square().mean()
    assert set(Shards(tmp_path / "awq").names()) == set(Shards(tmp_path / "rtn").names())


@pytest.mark.slow
def test_clipping_is_searched_only_where_it_is_asked_for(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    for name, clip in (("plain", False), ("clipped", True)):
        quantize_checkpoint(
            tiny_model(),
            tmp_path / name,
            format="awq",
            group_size=32,
            calibration=calibration(),
            clip=clip,
            progress=False,
        )
    plain, clipped = (Shards(tmp_path / name) for name in ("plain", "clipped"))
    attention = "model.layers.0.self_attn."
    assert torch.equal(
        plain.read(attention + "q_proj.scales"), clipped.read(attention + "q_proj.scales")
    )
    up = "model.layers.0.mlp.up_proj.scales"
    assert not torch.equal(plain.read(up), clipped.read(up))
    with pytest.raises(ValueError, match="clipping needs a format that AWQ calibrates"):
        quantize_checkpoint(tiny_model(), tmp_path / "x", format="gptq", clip=True, progress=False)


def test_output_error_is_that_of_the_outputs() -> None:
    x, difference = torch.randn(100, 16), torch.randn(8, 16)
    expected = (difference @ x.T).square().sum(0).mean()
    assert output_error(difference, x.T @ x / 100) == pytest.approx(float(expected), rel=1e-4)
