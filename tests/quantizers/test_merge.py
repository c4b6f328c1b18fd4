"""A merged checkpoint is the base with the adapter, up to the rounding it reports."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.layout import Layout
from nybble.loaders import (
    AdapterError,
    CheckpointError,
    LoRAAdapter,
    combine_adapters,
    load_adapter,
    open_checkpoint,
    save_packed,
)
from nybble.loaders.adapter import LoRAModule
from nybble.loaders.adapter_changes import MatrixChange
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.formats import Settings
from nybble.loaders.formats.awq import Awq
from nybble.loaders.formats.gptq import Gptq
from nybble.loaders.shards import Shards
from nybble.loaders.tokenizer import load_tokenizer
from nybble.models import architecture_of
from nybble.quantizers import merge_adapter, merge_divergence, quantize_checkpoint

FORMATS = ["gptq", "awq", "nf4", "fp4"]


@pytest.fixture
def adapter(tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]) -> LoRAAdapter:
    return loaded(tiny_model, tiny_adapter(target_modules=["q_proj", "up_proj"], seed=5))


def loaded(tiny_model: Callable[..., Path], folder: Path) -> LoRAAdapter:
    return load_adapter(folder, architecture_of(AutoConfig.from_pretrained(tiny_model())))


def quantized(source: Path, folder: Path, format: str, variant: str = "") -> Path:
    """variant, of GPTQ: ``sym`` or ``desc_act``, the latter with its groups shuffled."""
    sym = variant == "sym"
    quantize_checkpoint(source, folder, format=format, group_size=32, sym=sym, progress=False)  # type: ignore[arg-type]
    if variant == "desc_act":
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith("g_idx")]:
            torch.manual_seed(len(tensors[name]))
            tensors[name] = tensors[name][torch.randperm(len(tensors[name]))]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["desc_act"] = True
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def projections(folder: Path) -> dict[str, PackedWeight | DenseWeight]:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    shards = Shards(folder)
    names = checkpoint.architecture.linears
    return {name: checkpoint.projection(shards, name) for name in names}


def dense(weight: PackedWeight | DenseWeight) -> Tensor:
    return weight.dequantize() if isinstance(weight, PackedWeight) else weight.weight.float()


def test_a_merged_16_bit_model_equals_peft_s(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """peft merges in float32 here; both are rounded to bfloat16 once."""
    from peft import PeftModel

    folder = tiny_adapter(rank_pattern={"q_proj": 2}, use_rslora=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    merge_adapter(tiny_model(), loaded(tiny_model, folder), tmp_path / "merged", progress=False)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == load_file(tiny_model() / "model.safetensors").keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-6)
    # The folder is a complete model for anyone.
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


WITH_MAGNITUDES_OR_BIASES: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
    "dora and all biases": {"use_dora": True, "bias": "all", "target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("kind", WITH_MAGNITUDES_OR_BIASES)
def test_merged_magnitudes_and_biases_equal_peft_s(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    from peft import PeftModel

    folder = tiny_adapter(**WITH_MAGNITUDES_OR_BIASES[kind])
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    adapter = loaded(tiny_model, folder)
    merge_adapter(tiny_model(), adapter, tmp_path / "merged", progress=False)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(tiny_model() / "model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-6)
    for name, module in adapter.modules.items():
        if module.changes_weight:
            assert not torch.equal(found[name + ".weight"], before[name + ".weight"])
        if module.changes_bias:
            assert not torch.equal(found[name + ".bias"], before[name + ".bias"])


BOTH_ENDS, LORA = ["embed_tokens", "lm_head"], "LoRA on both ends"
WITH_TOKENS: dict[str, dict[str, Any]] = {
    "rows saved as they are": {},
    "rows trained": {"new_rows": "trained"},
    "matrices trained": {"modules_to_save": BOTH_ENDS},
    LORA: {"target_modules": ["v_proj", *BOTH_ENDS]},
    "more rows than tokens": {"rows": 384},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", WITH_TOKENS)
def test_merged_tokens_equal_peft_s_with_their_tokenizer(
    tiny_model: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    tied: bool,
) -> None:
    from peft import PeftModel

    model = tiny_model(tie_word_embeddings=tied)
    folder = tiny_token_adapter(tied=tied, **WITH_TOKENS[kind])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = WITH_TOKENS[kind].get("rows", len(tokenizer))
    base.resize_token_embeddings(rows, mean_resizing=False)
    unmerged = PeftModel.from_pretrained(base, folder).eval()
    text = "the <plan> fox<|tool|> jumps zyx over"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        wanted = unmerged(ids).logits
    expected = unmerged.merge_and_unload().state_dict()
    adapter = load_adapter(folder, architecture_of(AutoConfig.from_pretrained(model)))
    merge_adapter(model, adapter, tmp_path / "merged", progress=False, folder=folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == rows
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=0.05, atol=0.12)
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    # Into one matrix, peft merges the LoRA of both ends, which is not what it computes unmerged.
    twice = {"model.embed_tokens.weight", "lm_head.weight"} if tied and kind == LORA else set()
    for name in found.keys() - twice:
        torch.testing.assert_close(found[name], expected[name], rtol=2**-8, atol=1e-6)
    written = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert written(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert max(written(text)["input_ids"]) >= 320
    assert written.special_tokens_map == tokenizer.special_tokens_map
    assert written.chat_template == AutoTokenizer.from_pretrained(model).chat_template


@pytest.mark.parametrize("merged_format", [None, pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", FORMATS)
def test_a_4_bit_base_gets_the_tokens_too(
    tiny_model: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    tmp_path: Path,
    format: str,
    merged_format: Any,
) -> None:
    base = quantized(tiny_model(), tmp_path / "base", format)
    folder = Path(shutil.copytree(tiny_token_adapter(new_rows="trained"), tmp_path / "adapter"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    adapter = loaded(tiny_model, folder)
    target = tmp_path / "merged"
    calibration = None if merged_format else torch.randint(3, 300, (6, 40))
    merge_adapter(
        base,
        adapter,
        target,
        format=merged_format,
        calibration=calibration,
        progress=False,
        folder=folder,
    )
    checkpoint = open_checkpoint(target)
    assert checkpoint.format == (format if merged_format is None else "none")
    tokenizer = load_tokenizer(target)
    assert checkpoint.config.vocab_size == len(tokenizer) == 324
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    text = torch.randint(3, 300, (90,), generator=torch.Generator().manual_seed(0))
    text[::5] = 321
    effect = merge_divergence(base, adapter, base, text % 320, length=40, dtype=torch.float32)
    cost = merge_divergence(base, adapter, target, text, length=40, dtype=torch.float32)
    assert cost < effect * (0.01 if merged_format else 0.6)


def test_a_tokenizer_without_rows_for_its_tokens_is_not_written(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(tiny_adapter(), tmp_path / "adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_token_adapter() / name, folder)
    adapter, target = loaded(tiny_model, folder), tmp_path / "merged"
    merge_adapter(tiny_model(), adapter, target, progress=False, folder=folder)
    for name in ("tokenizer.json", "config.json"):
        before = json.loads((tiny_model() / name).read_text())
        assert json.loads((target / name).read_text()) == before, name


@pytest.mark.parametrize("kind", WITH_MAGNITUDES_OR_BIASES)
@pytest.mark.parametrize("format", ["gptq", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_4_bit_base_merged_with_magnitudes_or_biases_says_what_both_say(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    format: str,
    kind: str,
) -> None:
    base = quantized(tiny_model(), tmp_path / "base", format)
    adapter = loaded(tiny_model, tiny_adapter(**WITH_MAGNITUDES_OR_BIASES[kind]))
    torch.manual_seed(0)
    text, calibration = torch.randint(3, 300, (90,)), torch.randint(3, 300, (6, 40))

    def divergence(target: Path, **options: Any) -> float:
        layers = merge_adapter(base, adapter, target, progress=False, **options)
        changed = {name for name, module in adapter.modules.items() if module.changes_weight}
        assert {layer.name for layer in layers} == changed
        assert max(layer.relative_to_change for layer in layers) < 1
        return merge_divergence(base, adapter, target, text, length=40, dtype=torch.float32)

    effect = merge_divergence(base, adapter, base, text, length=40, dtype=torch.float32)
    assert effect > 0.02
    assert divergence(tmp_path / "16", format="bf16") < 0.01 * effect
    assert divergence(tmp_path / "4") < 0.7 * effect
    assert divergence(tmp_path / "calibrated", calibration=calibration) < 0.7 * effect


def test_a_bias_for_a_layer_without_one_is_not_merged(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = loaded(tiny_model, tiny_adapter(lora_bias=True, target_modules=["q_proj", "o_proj"]))
    with pytest.raises(
        AdapterError, match=r"bias for model\.layers\.0\.self_attn\.o_proj, which has"
    ):
        merge_adapter(tiny_model(), adapter, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", [None, "nf4"])
def test_an_mtp_head_is_kept(tmp_path: Path, tiny_mtp: ModuleType, format: str | None) -> None:
    source = tmp_path / "m"
    tiny_mtp.write_tiny_mtp(source, "qwen3_5_text")
    base = AutoModelForCausalLM.from_pretrained(source)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", architecture_of(open_checkpoint(source).config))
    merge_adapter(source, adapter, tmp_path / "q", format=format, progress=False)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "q"))
    head = [name for name in before if name.startswith("mtp.")]
    assert head
    assert all(torch.equal(before[name], after[name]) for name in head)


@pytest.mark.parametrize(
    ("options", "kind"), [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "biases")]
)
def test_only_plain_lora_is_combined(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    options: dict[str, Any],
    kind: str,
) -> None:
    adapters = [loaded(tiny_model, tiny_adapter(**each)) for each in ({}, options)]
    with pytest.raises(AdapterError, match=f"an adapter has {kind} on .*: only plain LoRA can be"):
        combine_adapters(adapters, [1, 1])


@pytest.mark.parametrize(
    ("format", "variant"),
    [
        *((format, "") for format in (*FORMATS, "compressed-tensors")),
        ("gptq", "desc_act"),
        *((format, "sym") for format in ("gptq", "compressed-tensors")),
    ],
)
def test_a_4_bit_base_keeps_its_format_and_the_layers_without_an_adapter(
    tiny_model: Callable[..., Path],
    adapter: LoRAAdapter,
    tmp_path: Path,
    format: str,
    variant: str,
) -> None:
    base = quantized(tiny_model(), tmp_path / "base", format, variant)
    report = merge_adapter(base, adapter, tmp_path / "merged", progress=False)
    before, after = projections(base), projections(tmp_path / "merged")
    assert open_checkpoint(tmp_path / "merged").format == format
    assert {layer.name for layer in report} == adapter.modules.keys()
    errors = {layer.name: layer.error for layer in report}
    for name, weight in after.items():
        assert isinstance(weight, PackedWeight)
        module = adapter.modules.get(name)
        if module is None:
            assert torch.equal(dense(weight), dense(before[name]))
            continue
        exact = dense(before[name]) + module.scale * module.b @ module.a
        error = float((dense(weight) - exact).norm() / exact.norm())
        assert error == pytest.approx(errors[name], rel=1e-3)
        assert 0.01 < error < 0.15
        assert not torch.equal(dense(weight), dense(before[name]))
    biases = load_file(tiny_model() / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(merged[name], biases[name])


@pytest.mark.parametrize("format", FORMATS)
def test_merged_layers_can_stay_in_16_bits(
    tiny_model: Callable[..., Path], adapter: LoRAAdapter, tmp_path: Path, format: str
) -> None:
    base = quantized(tiny_model(), tmp_path / "base", format)
    target = tmp_path / "merged"
    report = merge_adapter(base, adapter, target, keep_16_bits=True, progress=False)
    assert max(layer.error for layer in report) < 2**-8
    before, after = projections(base), projections(target)
    for name, weight in after.items():
        assert isinstance(weight, DenseWeight) == (name in adapter.modules)
        if name not in adapter.modules:
            assert torch.equal(dense(weight), dense(before[name]))
    settings = json.loads((target / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.up_proj" in json.dumps(settings).replace("\\\\", "")


def nibbles(words: Tensor, order: list[int]) -> Tensor:
    """int32 ``(rows, n)`` to ``(rows, 8 n)``, nibble i being column ``order[i]`` of its word."""
    columns = [words.long() >> 4 * order.index(column) & 15 for column in range(8)]
    return torch.stack(columns, -1).flatten(1)


def published(tensors: dict[str, Tensor], name: str, format: str) -> Tensor:
    """What a layer's tensors mean by the formulas of AutoGPTQ and AutoAWQ, ``(out, in)``."""
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].float()
    words, zeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    scales = tensors[f"{name}.scales"].float()
    if format == "gptq":
        groups = tensors[f"{name}.g_idx"].long()
        codes = nibbles(words.T, list(range(8))).T
        points = nibbles(zeros, list(range(8))) + 1 & 15
    else:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        codes, points = nibbles(words, order), nibbles(zeros, order)
        groups = torch.arange(len(codes)) // (len(codes) // len(scales))
    return (scales[groups] * (codes - points[groups])).T


@pytest.mark.parametrize("keep_16_bits", [False, True])
@pytest.mark.parametrize(
    ("format", "variant"),
    [("gptq", ""), ("gptq", "desc_act"), ("gptq", "sym"), ("awq", ""), ("nf4", ""), ("fp4", "")],
)
def test_others_read_what_was_merged(
    tiny_model: Callable[..., Path],
    adapter: LoRAAdapter,
    tmp_path: Path,
    format: str,
    variant: str,
    keep_16_bits: bool,
) -> None:
    """transformers with bitsandbytes reads NF4 and FP4. GPTQ and AWQ it reads with packages that
    need a GPU, so those are put into its model by the published formula. Both give every layer the
    weight that is served here, and next to the logits of the 16-bit merge."""
    base = quantized(tiny_model(), tmp_path / "base", format, variant)
    target, dense_target = tmp_path / "merged", tmp_path / "dense"
    merge_adapter(base, adapter, target, keep_16_bits=keep_16_bits, progress=False)
    merge_adapter(base, adapter, dense_target, format="bf16", progress=False)
    if format in ("nf4", "fp4"):
        model = AutoModelForCausalLM.from_pretrained(target, device_map="cpu")
        for name, expected in projections(target).items():
            layer = model.get_submodule(name)
            quantized_layer = isinstance(layer, Linear4bit)
            assert quantized_layer == isinstance(expected, PackedWeight)
            weight = layer.weight
            if quantized_layer:
                weight = dequantize_4bit(weight.data, weight.quant_state)
            torch.testing.assert_close(weight.float(), dense(expected), rtol=2**-8, atol=0)
    else:
        tensors = load_file(target / "model.safetensors")
        state = {n: t for n, t in tensors.items() if n.endswith((".weight", ".bias"))}
        for name, expected in projections(target).items():
            state[f"{name}.weight"] = published(tensors, name, format)
            torch.testing.assert_close(state[f"{name}.weight"], dense(expected))
        config = AutoConfig.from_pretrained(tiny_model())
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(state)
    wanted = AutoModelForCausalLM.from_pretrained(dense_target, dtype=torch.bfloat16)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        found, exact = (m(ids).logits.float().log_softmax(-1) for m in (model, wanted))
    divergence = torch.nn.functional.kl_div(found, exact, reduction="none", log_target=True)
    assert divergence.sum(-1).mean() < (0.02 if keep_16_bits else 0.5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("merged_format", [None, "bf16"])
def test_the_merged_model_says_what_base_and_adapter_say(
    tiny_model: Callable[..., Path],
    adapter: LoRAAdapter,
    tmp_path: Path,
    format: str,
    merged_format: Any,
) -> None:
    """In 4 bits the divergence is well below the adapter's own effect, in 16 bits it is nothing."""
    base = quantized(tiny_model(), tmp_path / "base", format)
    merge_adapter(base, adapter, tmp_path / "merged", format=merged_format, progress=False)
    torch.manual_seed(0)
    text = torch.randint(3, 300, (90,))

    def divergence(merged: Path) -> float:
        return merge_divergence(base, adapter, merged, text, length=40, dtype=torch.float32)

    effect = divergence(base)
    assert effect > 0.1
    assert divergence(tmp_path / "merged") < effect * (0.002 if merged_format else 0.4)
    expected = "none" if merged_format else format
    assert open_checkpoint(tmp_path / "merged").format == expected


@pytest.mark.parametrize(
    ("format", "variant"),
    [
        ("gptq", "desc_act"),
        ("awq", ""),
        *(
            pytest.param(format, "", marks=pytest.mark.slow)
            for format in FORMATS
            if format != "awq"
        ),
    ],
)
def test_calibrated_rounding_keeps_the_grid_and_more_of_the_adapter(
    tiny_model: Callable[..., Path], tmp_path: Path, format: str, variant: str
) -> None:
    """The change is well below a step of the grid: nearest codes on that grid would lose it all."""
    base = quantized(tiny_model(), tmp_path / "base", format, variant)
    generator = torch.Generator().manual_seed(3)
    linears = architecture_of(open_checkpoint(base).config).linears
    small = LoRAAdapter(
        {
            name: LoRAModule(
                torch.randn(4, each.inputs, generator=generator) * each.inputs**-0.5,
                torch.randn(each.out, 4, generator=generator) * 0.1,
                0.3,
            )
            for name, each in linears.items()
            if "o_proj" not in name
        },
        b"",
    )
    # Few different tokens: inputs are alike, as real ones are, so errors can make up for others.
    calibration, text = torch.randint(3, 30, (25, 40), generator=generator).split([20, 5])
    rounded = merge_adapter(base, small, tmp_path / "nearest", progress=False)
    calibrated = merge_adapter(
        base, small, tmp_path / "calibrated", calibration=calibration, progress=False
    )
    assert [layer.name for layer in calibrated] == [layer.name for layer in rounded]
    before, after = projections(base), projections(tmp_path / "calibrated")
    for name, weight in after.items():
        was = before[name]
        assert isinstance(weight, PackedWeight)
        assert isinstance(was, PackedWeight)
        assert torch.equal(weight.scales, was.scales)
        assert torch.equal(weight.codes(), was.codes()) == (name not in small.modules)

    def divergence(merged: Path) -> float:
        return merge_divergence(base, small, merged, text.flatten(), length=40, dtype=torch.float32)

    found = divergence(tmp_path / "calibrated")
    assert found < 0.75 * divergence(tmp_path / "nearest")
    assert found < 0.75 * divergence(base)


def test_calibrated_rounding_into_another_format_is_better_than_the_nearest(
    tiny_model: Callable[..., Path], adapter: LoRAAdapter, tmp_path: Path
) -> None:
    # Few different tokens: inputs are alike, as real ones are, so errors can make up for others.
    generator = torch.Generator().manual_seed(0)
    calibration, text = torch.randint(3, 30, (30, 40), generator=generator).split([20, 10])
    for format in FORMATS:
        found = []
        for tokens in (calibration, None):
            target = tmp_path / f"{format}{tokens is None}"
            options: Any = {"format": format, "calibration": tokens, "progress": False}
            merge_adapter(tiny_model(), adapter, target, **options)
            assert open_checkpoint(target).format == format
            found.append(merge_divergence(tiny_model(), adapter, target, text.flatten(), length=40))
        assert found[0] < 0.9 * found[1]


@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_several_adapters_combine_as_in_peft(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], combination: Any
) -> None:
    from peft import PeftModel

    folders = [
        tiny_adapter(seed=1),
        tiny_adapter(seed=6, lora_alpha=3),
        tiny_adapter(target_modules=["q_proj", "up_proj"], seed=7),
    ]
    weights = [0.7, -0.4, 1.5]
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(index))
    model.add_weighted_adapter(["0", "1", "2"], weights, "both", combination_type=combination)
    adapters = [loaded(tiny_model, folder) for folder in folders]
    combined = combine_adapters(adapters, weights, combination=combination)
    for name, module in combined.modules.items():
        expected = model.base_model.model.get_submodule(name).get_delta_weight("both")
        torch.testing.assert_close(module.scale * module.b @ module.a, expected)
    assert combined.digest != combine_adapters(adapters, [1, 1, 1]).digest


def test_linear_combination_of_different_ranks_is_refused(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    adapters = [loaded(tiny_model, tiny_adapter(seed=1)), loaded(tiny_model, tiny_adapter(r=2))]
    with pytest.raises(AdapterError, match="has ranks 2, 4: linear combination needs equal"):
        combine_adapters(adapters, [1, 1], combination="linear")
    with pytest.raises(AdapterError, match="2 adapters and 1 weights"):
        combine_adapters(adapters, [1])


def test_what_cannot_be_merged_is_refused(
    tiny_model: Callable[..., Path], adapter: LoRAAdapter, tmp_path: Path
) -> None:
    layout: Layout = "rows"
    save_packed(open_checkpoint(tiny_model()), tmp_path / "packed", layout=layout, progress=False)
    with pytest.raises(CheckpointError, match="is the packed form: give the checkpoint"):
        merge_adapter(tmp_path / "packed", adapter, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="only in the source's own 4-bit format"):
        merge_adapter(tiny_model(), adapter, tmp_path / "out", keep_16_bits=True, progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path / 'full'} is not empty")):
        merge_adapter(tiny_model(), adapter, tmp_path / "full", progress=False)
    module = LoRAModule(torch.zeros(1, 192), torch.zeros(192, 1), 1.0)
    unaligned = LoRAAdapter({"model.layers.0.self_attn.q_proj": module}, b"")
    small = tiny_model(hidden_size=192)
    misfit = "do not divide into groups of 128 .* choose another group size"
    with pytest.raises(CheckpointError, match=misfit):
        merge_adapter(small, unaligned, tmp_path / "out", format="gptq", progress=False)
    assert not (tmp_path / "out").exists()
    merge_adapter(small, unaligned, tmp_path / "out", format="gptq", group_size=64, progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["group_size"] == 64
    for format in (None, "bf16"):
        with pytest.raises(ValueError, match="group_size goes with a 4-bit format that the base"):
            merge_adapter(small, unaligned, tmp_path / "x", format=format, group_size=64)


def changed_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def test_act_order_that_only_quantize_config_json_tells_of_is_kept(
    tiny_model: Callable[..., Path], adapter: LoRAAdapter, tmp_path: Path
) -> None:
    base = quantized(tiny_model(), tmp_path / "base", "gptq", "desc_act")
    settings = settings_of(base)
    changed_config(base, lambda config: config.pop("quantization_config"))
    del settings["quant_method"]
    (base / "quantize_config.json").write_text(json.dumps(settings))
    merge_adapter(base, adapter, tmp_path / "merged", progress=False)
    read = AutoConfig.from_pretrained(tmp_path / "merged").quantization_config
    assert (read["desc_act"], read["group_size"], read["quant_method"]) == (True, 32, "gptq")
    # The old file would contradict the new one, for those who read it first.
    assert not (tmp_path / "merged" / "quantize_config.json").exists()


def leave_in_16_bits(folder: Path, source: Path, module: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    dense = load_file(source / "model.safetensors")[module + ".weight"]
    kept = {n: t for n, t in tensors.items() if not n.startswith(module + ".")}
    biases = {n: t for n, t in tensors.items() if n == module + ".bias"}
    save_file({**kept, **biases, module + ".weight": dense}, folder / "model.safetensors")


@pytest.mark.parametrize("keep_16_bits", [False, True])
@pytest.mark.parametrize(
    ("format", "key", "value"),
    [
        ("gptq", "dynamic", {r"-:model\.layers\.0\.mlp\.up_proj": {}}),
        ("awq", "modules_to_not_convert", ["lm_head", "model.layers.0.mlp.up_proj"]),
        ("nf4", "llm_int8_skip_modules", ["lm_head", "model.layers.0.mlp.up_proj"]),
    ],
)
def test_layers_a_base_has_in_16_bits_stay_so_and_its_config_goes_on_saying_it(
    tiny_model: Callable[..., Path],
    adapter: LoRAAdapter,
    tmp_path: Path,
    format: str,
    key: str,
    value: Any,
    keep_16_bits: bool,
) -> None:
    base, module = quantized(tiny_model(), tmp_path / "base", format), "model.layers.0.mlp.up_proj"
    leave_in_16_bits(base, tiny_model(), module)
    changed_config(base, lambda config: config["quantization_config"].update({key: value}))
    assert module in adapter.modules
    target = tmp_path / "merged"
    merge_adapter(base, adapter, target, keep_16_bits=keep_16_bits, progress=False)
    after = projections(target)
    assert isinstance(after[module], DenseWeight)
    written = settings_of(target)[key]
    if not keep_16_bits:
        assert written == value
    for other in ("model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        assert isinstance(after[other], DenseWeight) == keep_16_bits
        said = [
            re.match(pattern.removeprefix("-:"), other) if format == "gptq" else pattern == other
            for pattern in written
        ]
        assert any(said) == keep_16_bits


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("variant", ["rounded", "calibrated", "kept"])
def test_a_base_of_another_width_keeps_it(
    tiny_model: Callable[..., Path],
    adapter: LoRAAdapter,
    tmp_path: Path,
    bits: int,
    variant: str,
) -> None:
    options: Any = {"format": "gptq", "group_size": 32, "bits": bits, "progress": False}
    quantize_checkpoint(tiny_model(), tmp_path / "base", **options)
    tokens = torch.randint(3, 300, (20, 40), generator=torch.Generator().manual_seed(0))
    report = merge_adapter(
        tmp_path / "base",
        adapter,
        tmp_path / "merged",
        keep_16_bits=variant == "kept",
        calibration=tokens if variant == "calibrated" else None,
        progress=False,
    )
    assert settings_of(tmp_path / "merged")["bits"] == bits
    before, after = projections(tmp_path / "base"), projections(tmp_path / "merged")
    most = {2: 0.6, 3: 0.3, 8: 0.02}[bits]
    for layer in report:
        module = adapter.modules[layer.name]
        exact = dense(before[layer.name]) + module.scale * module.b @ module.a
        error = float((dense(after[layer.name]) - exact).norm() / exact.norm())
        assert error < (2**-8 if variant == "kept" else 2 * most)
    for name in after.keys() - adapter.modules.keys():
        assert torch.equal(dense(after[name]), dense(before[name]))


@pytest.mark.parametrize("kind", ["gptq v2", "awq gemv"])
def test_a_packing_is_kept(
    tiny_model: Callable[..., Path], adapter: LoRAAdapter, tmp_path: Path, kind: str
) -> None:
    """The base is rewritten by its own format in another packing; the values stay the same."""
    plain = quantized(tiny_model(), tmp_path / "plain", kind.split()[0])
    base, format = tmp_path / "base", open_checkpoint(plain)
    assert isinstance(format, FolderCheckpoint)
    read = format.quantization
    assert isinstance(read, Gptq | Awq)
    change = {"checkpoint_format": "gptq_v2"} if isinstance(read, Gptq) else {"version": "gemv"}
    other = type(read).from_settings(Settings({**read.settings, **change}, "test"))
    shutil.copytree(plain, base)
    tensors = load_file(plain / "model.safetensors")
    for name in projections(plain):
        tensors |= other.tensors(name, read.quantized(Shards(plain), name))
    save_file(tensors, base / "model.safetensors")
    changed_config(base, lambda config: config.update(quantization_config=dict(other.settings)))
    for name, weight in projections(base).items():
        assert torch.equal(dense(weight), dense(projections(plain)[name]))
    for source, target in ((plain, tmp_path / "a"), (base, tmp_path / "b")):
        merge_adapter(source, adapter, target, progress=False)
    assert settings_of(tmp_path / "b").items() >= change.items()
    found = projections(tmp_path / "b")
    for name, weight in projections(tmp_path / "a").items():
        torch.testing.assert_close(dense(found[name]), dense(weight), atol=0.02, rtol=0.02)


def test_a_quantized_output_layer_follows_the_format_that_is_written(
    tiny_model: Callable[..., Path], adapter: LoRAAdapter, tmp_path: Path
) -> None:
    base = quantized(tiny_model(), tmp_path / "base", "gptq")
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    prefix = "model.layers.0.mlp.gate_proj."
    tensors |= {
        name.replace(prefix, "lm_head."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    save_file(tensors, base / "model.safetensors")
    expected = dict(open_checkpoint(base).weights())["lm_head"]
    assert isinstance(expected, PackedWeight)
    for format in (None, "nf4", "bf16"):
        merge_adapter(base, adapter, tmp_path / str(format), format=format, progress=False)
        found = dict(open_checkpoint(tmp_path / str(format)).weights())["lm_head"]
        assert isinstance(found, PackedWeight if format is None else DenseWeight)
        torch.testing.assert_close(dense(found), dense(expected), rtol=2**-8, atol=0)
    changed = replace(adapter, head=MatrixChange(ids=torch.tensor([3]), rows=torch.ones(1, 128)))
    with pytest.raises(
        CheckpointError, match=r"changes lm_head, which .* has quantized: merge into"
    ):
        merge_adapter(base, changed, tmp_path / "refused", progress=False)
    with pytest.raises(CheckpointError, match=r"changes lm_head, which .* has quantized"):
        merge_adapter(base, replace(adapter, vocab=330), tmp_path / "refused", progress=False)
    merge_adapter(base, changed, tmp_path / "changed", format="bf16", progress=False)
    found = dense(dict(open_checkpoint(tmp_path / "changed").weights())["lm_head"])  # type: ignore[arg-type]
    assert (found[3] == 1).all()
    torch.testing.assert_close(found[4:], dense(expected)[4:], rtol=2**-8, atol=0)
