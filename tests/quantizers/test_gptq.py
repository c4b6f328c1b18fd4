"""GPTQ solves what it says: checked against the dense solution it is a fast form of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from nybble.kernels import PackedWeight
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.formats import AffineFormat, AffineWeight, WriteOptions, writing_format
from nybble.loaders.formats.affine import from_words
from nybble.quantizers import GptqSettings, quantize_checkpoint
from nybble.quantizers.affine import grid
from nybble.quantizers.gptq import gptq, inverse_factor
from nybble.quantizers.layers import DecoderLayers, linear_layer, output_error
from nybble.quantizers.rtn import quantize_affine


def correlated_inputs(tokens: int, columns: int) -> Tensor:
    mixing = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    return (torch.randn(tokens, columns) @ mixing) * torch.rand(columns).exp()


def dense_obs(weight: Tensor, hessian: Tensor, size: int, *, sym: bool, order: Tensor) -> Tensor:
    """Optimal Brain Surgeon, literally: one column at a time, H⁻¹ of the columns left over.

    After fixing column q to its rounded value, the best change of the others is
    −(w_q − ŵ_q) / [H_F⁻¹]_qq · [H_F⁻¹]_q, H_F being H without the columns already fixed. Returns
    the dequantized weight.
    """
    left = weight.double().clone()
    done = torch.empty_like(left)
    scales, zeros = torch.empty(0), torch.empty(0)
    for step in range(len(order)):
        free = order[step:]
        inverse = torch.linalg.inv(hessian[free][:, free])
        if step % size == 0:
            group = left[:, order[step : step + size]].float()
            scales, zeros = grid(group.amin(1), group.amax(1), sym=sym)
        column, scale, zero = left[:, order[step]], scales.double(), zeros.double()
        code = ((column / scale).round() + zero).clamp(0, 15)
        done[:, order[step]] = scale * (code - zero)
        error = (column - done[:, order[step]]) / inverse[0, 0]
        left[:, free] -= torch.outer(error, inverse[0])
    return done


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("columns", "size"), [(32, 8), (48, 48), (192, 96), (256, 128)])
def test_it_is_the_dense_optimal_brain_surgeon(
    columns: int, size: int, sym: bool, desc_act: bool
) -> None:
    torch.manual_seed(columns + size)
    x, weight = correlated_inputs(4 * columns, columns), torch.randn(24, columns)
    hessian = (x.T @ x).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    order = torch.arange(columns)
    if desc_act:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    expected = dense_obs(weight, damped, size, sym=sym, order=order)
    found = gptq(weight, hessian, size, sym=sym, settings=GptqSettings(desc_act=desc_act))
    # A value half-way between two codes may fall to either side: few do, and not systematically.
    same = torch.isclose(found.dequantize().double(), expected, atol=1e-6)
    assert same.all(dim=1).double().mean() > 0.8
    moment = hessian.float()
    assert output_error(found.dequantize() - weight, moment) == pytest.approx(
        output_error(expected.float() - weight, moment), rel=0.02
    )


def test_the_inverse_factor_needs_no_inverse() -> None:
    x = correlated_inputs(200, 50).double()
    upper = inverse_factor(x.T @ x)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper, torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True))


@pytest.mark.parametrize(
    "settings",
    [
        GptqSettings(),
        GptqSettings(desc_act=True),
        GptqSettings(static_groups=True),
        GptqSettings(desc_act=True, static_groups=True),
    ],
)
@pytest.mark.parametrize("sym", [False, True])
def test_outputs_err_less_than_by_rounding(settings: GptqSettings, sym: bool) -> None:
    torch.manual_seed(1)
    x, weight = correlated_inputs(512, 128), torch.randn(64, 128)
    moment = x.T @ x
    ours = gptq(weight, moment, 32, sym=sym, settings=settings)
    plain = quantize_affine(weight, 32, sym=sym)
    assert output_error(ours.dequantize() - weight, moment) < 0.9 * output_error(
        plain.dequantize() - weight, moment
    )


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_grid_of_another_width_is_solved_as_well(bits: int) -> None:
    torch.manual_seed(1)
    x, weight = correlated_inputs(512, 128), torch.randn(64, 128)
    moment = x.T @ x
    ours, plain = (
        gptq(weight, moment, 32, bits=bits),
        quantize_affine(weight, 32, sym=False, bits=bits),
    )
    assert int(ours.codes.max()) == int(plain.codes.max()) == 2**bits - 1
    errors = [output_error(one.dequantize() - weight, moment) for one in (ours, plain)]
    assert errors[0] < 0.9 * errors[1]
    coarser = quantize_affine(weight, 32, sym=False, bits=bits - 1)
    assert output_error(coarser.dequantize() - weight, moment) > 2 * errors[1]


def test_static_groups_keep_the_columns_in_order() -> None:
    torch.manual_seed(2)
    x, weight = correlated_inputs(256, 64), torch.randn(16, 64)
    settings = GptqSettings(desc_act=True, static_groups=True)
    found = gptq(weight, x.T @ x, 16, settings=settings)
    plain = quantize_affine(weight, 16, sym=False)
    assert torch.equal(found.g_idx, torch.arange(64) // 16)
    assert torch.equal(found.scales, plain.scales)
    assert torch.equal(found.zeros, plain.zeros)
    assert not torch.equal(found.codes, plain.codes)


def test_act_order_puts_the_strongest_inputs_into_the_first_group() -> None:
    torch.manual_seed(3)
    x = torch.randn(256, 64)
    x[:, 40:56] *= 10
    found = gptq(torch.randn(16, 64), x.T @ x, 16, settings=GptqSettings(desc_act=True))
    assert (found.g_idx == 0).nonzero().flatten().tolist() == list(range(40, 56))


def test_an_input_that_is_always_zero_takes_no_part() -> None:
    torch.manual_seed(4)
    x, weight = correlated_inputs(256, 32), torch.randn(8, 32)
    x[:, [3, 17]] = 0
    weight[:, 3] = 1e4  # would ruin the scale of its group
    found = gptq(weight, x.T @ x, 32)
    assert (found.dequantize()[:, [3, 17]] == 0).all()
    without = torch.ones(32, dtype=torch.bool)
    without[[3, 17]] = False
    error = (found.dequantize() - weight)[:, without].abs().max()
    assert error < 3


def test_weights_of_all_zero_columns_and_hessians_of_zero_survive() -> None:
    found = gptq(torch.randn(8, 16), torch.zeros(16, 16), 16)
    assert (found.dequantize() == 0).all()


def test_a_damping_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="damp is 0, expected a fraction"):
        GptqSettings(damp=0)


def calibration(samples: int = 24, length: int = 64) -> Tensor:
    return torch.randint(0, 300, (samples, length), generator=torch.Generator().manual_seed(0))


def layer_errors_by_rounding(source: Path, tokens: Tensor, group_size: int) -> dict[str, float]:
    """Of every layer, on the inputs the full-precision model gives it."""
    blocks = DecoderLayers(source, torch.device("cpu"), tokens.shape[1])
    hidden = blocks.embed(tokens)
    errors = {}
    for index in range(len(blocks)):
        block = blocks.load(index)
        statistics = blocks.statistics(block, hidden, [g.linears[0].name for g in blocks.groups(0)])
        hidden = blocks.outputs(block, hidden)
        for group in blocks.groups(index):
            moment = statistics[group.linears[0].name].second_moment
            for name in (linear.name for linear in group.linears):
                weight = linear_layer(block, name).weight.float()
                rounded = quantize_affine(weight, group_size, sym=False).dequantize()
                errors[f"model.layers.{index}.{name}"] = output_error(
                    rounded - weight, moment
                ) / output_error(weight, moment)
        blocks.unload(index)
    return errors


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "qwen2"])
def test_every_layer_errs_less_than_by_rounding(
    tmp_path: Path, tiny_model: Callable[..., Path], family: str, desc_act: bool
) -> None:
    source, tokens = tiny_model(family=family), calibration()
    settings = GptqSettings(desc_act=desc_act)
    reports = quantize_checkpoint(
        source,
        tmp_path / "q",
        format="gptq",
        group_size=32,
        calibration=tokens,
        settings=settings,
        progress=False,
    )
    by_rounding = layer_errors_by_rounding(source, tokens, 32)
    assert {report.name for report in reports} == set(by_rounding)
    for report in reports:
        assert report.relative < by_rounding[report.name], report.name


@pytest.mark.parametrize(
    ("bits", "sym", "desc_act"),
    [
        (4, False, True),
        (4, True, False),
        (3, False, True),
        (8, True, False),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                *((4, False, False), (4, True, True), (2, False, False)),
                *((3, True, False), (8, False, True)),
            ]
        ),
    ],
)
def test_the_checkpoint_loads_back_as_it_was_computed(
    tmp_path: Path, tiny_model: Callable[..., Path], bits: int, sym: bool, desc_act: bool
) -> None:
    """The first layers read the embeddings' norm: their GPTQ is redone here from the start."""
    source, tokens = tiny_model(), calibration()
    settings = GptqSettings(desc_act=desc_act)
    quantize_checkpoint(
        source,
        tmp_path / "q",
        format="gptq",
        group_size=32,
        sym=sym,
        bits=bits,
        calibration=tokens,
        settings=settings,
        progress=False,
    )
    blocks = DecoderLayers(source, torch.device("cpu"), tokens.shape[1])
    block, name = blocks.load(0), "self_attn.q_proj"
    moment = blocks.statistics(block, blocks.embed(tokens), [name])[name].second_moment
    parts = [linear_layer(block, f"self_attn.{part}_proj").weight.float() for part in "qkv"]
    expected = gptq(
        torch.cat(parts), moment, 32, sym=sym, bits=bits, least_zero=1, settings=settings
    )
    loaded = dict(open_checkpoint(tmp_path / "q").weights())["model.layers.0.self_attn.qkv_proj"]
    assert isinstance(loaded, PackedWeight)
    assert (loaded.perm is not None) == (desc_act or bits == 8)
    assert torch.equal(loaded.dequantize(), expected.dequantize())


@pytest.mark.parametrize(
    ("format", "kind", "expected"),
    [
        ("gptq", GPTQConfig, {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}),
        ("awq", AwqConfig, {"bits": 4, "group_size": 32, "zero_point": True}),
        ("nf4", BitsAndBytesConfig, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ],
)
def test_transformers_understands_the_quantization_config(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    format: Literal["gptq", "awq", "nf4"],
    kind: type,
    expected: dict[str, object],
) -> None:
    quantize_checkpoint(tiny_model(), tmp_path / "q", format=format, group_size=32, progress=False)
    settings = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    read = AutoQuantizationConfig.from_dict(settings)
    assert isinstance(read, kind)
    assert {name: getattr(read, name) for name in expected} == expected
    unknown = set(settings) - set(read.to_dict())
    assert not unknown


def test_true_sequential_changes_what_later_layers_see(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    errors = {}
    for sequential in (False, True):
        reports = quantize_checkpoint(
            tiny_model(),
            tmp_path / str(sequential),
            format="gptq",
            group_size=32,
            calibration=calibration(),
            settings=GptqSettings(true_sequential=sequential),
            progress=False,
        )
        errors[sequential] = {report.name: report.relative for report in reports}
    first, later = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert errors[True][first] == errors[False][first]
    assert errors[True][later] != errors[False][later]


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_a_layer_of_zeros_stays_one(
    tmp_path: Path, tiny_model: Callable[..., Path], format: str
) -> None:
    """As models have that were made deeper (LLaMA Pro)."""
    source = Path(shutil.copytree(tiny_model(family="llama"), tmp_path / "m"))
    tensors = load_file(source / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    tensors[f"{module}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    errors = quantize_checkpoint(
        source,
        tmp_path / "q",
        format=format,
        group_size=32,
        calibration=calibration(),
        progress=False,
    )
    assert {error.name: error.relative for error in errors}[module] == 0
    found = dict(open_checkpoint(tmp_path / "q").weights())[module]
    assert isinstance(found, PackedWeight)
    assert not found.dequantize().any()


def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def quantize(**options: object) -> None:
        quantize_checkpoint(tiny_model(), tmp_path / "q", progress=False, **options)  # type: ignore[arg-type]

    with pytest.raises(CheckpointError, match="do not divide into groups of 48"):
        quantize(format="gptq", group_size=48)
    with pytest.raises(CheckpointError, match=r"calibration texts of 1024 tokens: .* takes 512"):
        quantize(format="gptq", group_size=32, calibration=calibration(1, 1024))
    with pytest.raises(ValueError, match="nf4 takes no calibration text"):
        quantize(format="nf4", calibration=calibration())
    with pytest.raises(ValueError, match="settings need a format that GPTQ calibrates"):
        quantize(format="gptq", settings=GptqSettings())
    with pytest.raises(ValueError, match="bits is 5, expected one of 2, 3, 4, 8"):
        quantize(format="gptq", bits=5)
    with pytest.raises(ValueError, match="bits is for gptq, compressed-tensors, not for awq"):
        quantize(format="awq", bits=8)
    with pytest.raises(CheckpointError, match=r"48 outputs .* do not divide .* words of 32"):
        quantize_checkpoint(
            tiny_model(hidden_size=48),
            tmp_path / "q",
            format="gptq",
            bits=3,
            group_size=16,
            progress=False,
        )
    with pytest.raises(ValueError, match="double_quant is for nf4, fp4, not for awq"):
        quantize(format="awq", double_quant=True)
    assert not (tmp_path / "q").exists()
    assert not (tmp_path / "q.partial").exists()


def test_an_affine_weight_is_cut_by_outputs() -> None:
    whole = quantize_affine(torch.randn(16, 32), 8, sym=False)
    part = whole.rows(4, 9)
    assert isinstance(part, AffineWeight)
    assert torch.equal(part.dequantize(), whole.dequantize()[4:9])


def test_the_first_tokens_of_a_sequence_can_be_left_out(tiny_model: Callable[..., Path]) -> None:
    blocks = DecoderLayers(tiny_model(), torch.device("cpu"), 64)
    hidden, block = blocks.embed(calibration()), blocks.load(0)
    name = "self_attn.q_proj"
    before = blocks.statistics(block, hidden, [name], first=1)[name]
    hidden[:, 0] = torch.randn(hidden.shape[-1]).bfloat16()
    after = blocks.statistics(block, hidden, [name], first=1)[name]
    assert torch.equal(after.second_moment, before.second_moment)
    hidden[:, 1] = torch.randn(hidden.shape[-1]).bfloat16()
    changed = blocks.statistics(block, hidden, [name], first=1)[name]
    assert not torch.allclose(changed.second_moment, before.second_moment)


def test_gptq_spares_an_attention_sink(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Every text begins with one token, whose keys and values all the others read."""
    source, tokens = tiny_model(), calibration(16, 64)
    tokens[:, 0] = 7
    options = {"format": "gptq", "group_size": 32, "bits": 2, "progress": False}
    quantize_checkpoint(source, tmp_path / "q", calibration=tokens, **options)  # type: ignore[arg-type]
    quantize_checkpoint(source, tmp_path / "rtn", **options)  # type: ignore[arg-type]
    blocks = DecoderLayers(source, torch.device("cpu"), 64)
    hidden, name = blocks.embed(tokens), "self_attn.q_proj"
    block = blocks.load(0)
    seen: list[torch.Tensor] = []
    handle = block.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0][:, 0])
    )
    blocks.outputs(block, hidden)
    handle.remove()
    first = torch.cat(seen).float()
    exact = torch.cat([linear_layer(block, f"self_attn.{p}_proj").weight.float() for p in "qkv"])
    errors = {}
    for folder in ("q", "rtn"):
        weight = dict(open_checkpoint(tmp_path / folder).weights())[
            "model.layers.0.self_attn.qkv_proj"
        ]
        assert isinstance(weight, PackedWeight)
        errors[folder] = float((first @ (weight.dequantize() - exact).T).square().mean())
    assert errors["q"] < 0.5 * errors["rtn"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["rounding", "gptq"])
def test_version_1_never_holds_a_zero_of_0(bits: int, method: str) -> None:
    """It would be stored as all ones, to which readers add 1 without cutting the sum to the width.

    Groups of zeros and of one sign have their zero at an end of the codes.
    """
    torch.manual_seed(bits)
    weight = torch.randn(32, 64)
    weight[:8] = weight[:8].abs() + 0.1
    weight[8:16] = -weight[8:16].abs() - 0.1
    weight[16:20] = 0
    written = writing_format("gptq", WriteOptions(group_size=32, bits=bits))
    assert isinstance(written, AffineFormat)
    if method == "rounding":
        found = quantize_affine(weight, 32, sym=False, bits=bits, least_zero=written.least_zero)
    else:
        x = correlated_inputs(256, 64)
        found = gptq(weight, x.T @ x, 32, bits=bits, least_zero=written.least_zero)
    stored = written.tensors("layer", found)["layer.qzeros"]
    assert int(from_words(stored, bits).max()) < 2**bits - 1
    assert torch.equal(found.dequantize()[16:20], torch.zeros(4, 64))
    # The level below zero that the positive rows give away makes their steps a little wider.
    step = found.scales.float().repeat_interleave(32, 1)
    if method == "rounding":
        assert ((found.dequantize() - weight).abs() <= step * 1.01).all()
    free = quantize_affine(weight, 32, sym=False, bits=bits)
    two_sided = slice(20, None)
    assert int(free.zeros[:8].max()) == 0
    if method == "rounding":
        kept = free.zeros[two_sided] > 0
        assert torch.equal(found.scales[two_sided][kept], free.scales[two_sided][kept])
