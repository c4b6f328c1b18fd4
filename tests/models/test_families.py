"""Every family against transformers, peft and itself, by its small random model in families.py."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import AdapterConfig
from nybble.engine.parts import norm_part
from nybble.finetune import qat
from nybble.finetune.data import Batch, Example, to_batch
from nybble.finetune.lora import LoRASettings, adapter_tensors, add_lora, save_adapter
from nybble.finetune.qat import fake_quantize_model
from nybble.finetune.train import batch_loss, checkpoint_activations, packs, training_mode
from nybble.kernels import PackedWeight
from nybble.kernels import reference as reference_kernels
from nybble.loaders import Checkpoint, open_checkpoint
from nybble.loaders.adapter import load_adapter
from nybble.models import (
    Attention,
    LatentAttention,
    UnsupportedModelError,
    architecture_of,
    supported_families,
)
from nybble.quantizers import merge_adapter, quantize_checkpoint
from nybble.quantizers.awq import scale_block
from nybble.quantizers.layers import DecoderLayers, linear_layer
from nybble.quantizers.packed_model import load_packed_model

from .families import (
    PROMPTS,
    ROWS,
    SIZES,
    generating_rows,
    mixture_rows,
    packed_rows,
    qat_rows,
    quick_rows,
    rows,
    shown_rows,
    trained_rows,
)

CPU = torch.device("cpu")


def test_every_family_has_a_row() -> None:
    assert {family for family, _ in ROWS.values()} == set(supported_families())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("family", supported_families())
def test_linear_layers_have_biases_where_transformers_has_them(family: str, biased: bool) -> None:
    """A bias that the architecture does not have is refused."""
    settings = next(settings for name, settings in ROWS.values() if name == family)
    config = AutoConfig.for_model(family, **SIZES | settings)
    for name, value in config.to_dict().items():
        if "bias" in name and isinstance(value, bool):
            setattr(config, name, biased)
    try:
        architecture = architecture_of(config)
    except UnsupportedModelError:
        assert biased
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = {
        name: module.bias is not None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name in {*architecture.linears, architecture.head}
    }
    assert len(theirs) > 4
    heads = {architecture.head: architecture.head_bias}
    ours = {name: linear.bias for name, linear in architecture.linears.items()} | heads
    assert theirs == {name: ours[name] for name in theirs}


def test_a_kind_of_rope_that_nothing_computes_is_refused_by_name() -> None:
    config = AutoConfig.for_model("qwen2", rope_scaling={"type": "flurb", "factor": 2})
    with pytest.raises(UnsupportedModelError, match="rope_type is 'flurb'; supported are default"):
        architecture_of(config)


def test_state_spaces_are_refused_by_the_settings_that_nothing_computes() -> None:
    kinds = {"num_hidden_layers": 2, "layer_types": ["attention", "mamba"], "hidden_size": 64}
    settings = {**kinds, "mamba_n_heads": 8}
    with pytest.raises(UnsupportedModelError, match=r"time_step_limit is \(0.1, 0.2\)"):
        architecture_of(
            AutoConfig.for_model("granitemoehybrid", **settings, time_step_limit=[0.1, 0.2])
        )
    alone = AutoConfig.for_model("granitemoehybrid", **settings | {"layer_types": ["mamba"] * 2})
    with pytest.raises(UnsupportedModelError, match="no layer has attention"):
        architecture_of(alone)
    normed = AutoConfig.for_model("falcon_h1", mamba_rms_norm=True, mamba_norm_before_gate=True)
    with pytest.raises(UnsupportedModelError, match="mamba_norm_before_gate is True"):
        architecture_of(normed)
    with pytest.raises(UnsupportedModelError, match="multiple of its 3 groups"):
        architecture_of(AutoConfig.for_model("bamba", attn_layer_indices=[1], mamba_n_groups=3))
    experts = {"layers_block_type": ["moe", "full_attention"], "moe_latent_size": 64}
    with pytest.raises(UnsupportedModelError, match="moe_latent_size is 64"):
        architecture_of(AutoConfig.for_model("nemotron_h", **experts))


def test_nemotron_h_is_read_under_the_names_of_published_checkpoints(
    folder_of: Callable[[str], Path],
) -> None:
    folder = folder_of("nemotron_h")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "backbone.layers.0.mixer.A_log" in set(file.keys())
    names = {name for name, _ in open_checkpoint(folder).weights()}
    assert {"model.embeddings.weight", "model.layers.0.mixer.A_log", "model.norm_f.weight"} <= names


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Callable[[str], Path]:
    """A row's random model on disk, with a tokenizer."""
    built: dict[str, Path] = {}

    def build(row: str) -> Path:
        if row in built:
            return built[row]
        family, settings = ROWS[row]
        folder = built[row] = tmp_path_factory.mktemp("family") / family
        torch.manual_seed(0)  # some parameters are random from the start, such as decays
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | settings))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if "e_score_correction_bias" in name or "act_fn.beta" in name:
                    buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or "norm" in name or "bias" in name:  # of norms, and biases
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
                else:
                    std = (
                        0.3 if "embed" in name or "lm_head" in name else parameter.shape[1] ** -0.5
                    )
                    parameter.normal_(std=std, generator=generator)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model() / name, folder / name)
        return folder

    return build


def calibration() -> torch.Tensor:
    return torch.randint(3, 300, (4, 48), generator=torch.Generator().manual_seed(0))


@quick_rows
def test_logits_equal_transformers(
    reference: Any, folder_of: Callable[[str], Path], row: str
) -> None:
    reference.assert_same_logits(open_checkpoint(folder_of(row)))


@generating_rows
def test_64_greedy_tokens_equal_transformers_alone_and_in_company(
    reference: Any, folder_of: Callable[[str], Path], row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(folder_of(row))
    model = reference.transformers_model(checkpoint)
    prompts, expected = map(list, zip(*reference.greedy(model, PROMPTS, 64), strict=True))
    assert len({token for each in expected for token in each}) > 5, "all say the same"
    engine = reference.start(checkpoint)
    try:
        assert [reference.alone(engine, ids, 64) for ids in prompts] == expected
        # Prefixes are in the cache by now, and steps mix prompts with decodes. Sequences that lose
        # their blocks come back as prompts, of which windows and states are computed anew.
        reference.preempt_now_and_then(engine, monkeypatch, steps=12)
        assert reference.together(engine, prompts * 2, 64) == expected * 2
        assert engine.stats().prefix_hit_tokens > 0
        assert engine.stats().preemptions >= 4
    finally:
        engine.stop()


@rows
def test_norms_in_bfloat16_round_as_those_of_transformers(row: str) -> None:
    family, settings = ROWS[row]
    config = AutoConfig.for_model(family, **SIZES | settings, dtype=torch.bfloat16)
    model, architecture = AutoModelForCausalLM.from_config(config), architecture_of(config)
    norms = {architecture.final_norm: (config.hidden_size,)}
    latent = {}  # norms of latents, with their epsilons
    for index, layer in enumerate(architecture.layers):
        hidden = (layer.pre_attention, layer.post_attention, layer.pre_mlp, layer.post_mlp)
        shapes = {name: (config.hidden_size,) for name in hidden if name is not None}
        for about in layer.mixers:
            if isinstance(about, LatentAttention):
                shapes.update((name, (about.norm_size(name),)) for name in about.norms)
                latent |= {architecture.module(index, name): about.norm_eps for name in about.norms}
            if isinstance(about, Attention) and about.qk_norm is not None:
                shapes[about.q_norm] = about.norm_shape(about.heads)
                shapes[about.k_norm] = about.norm_shape(about.kv_heads)
        norms.update((architecture.module(index, name), shape) for name, shape in shapes.items())
    assert norms.keys() == set(architecture.norms)
    generator = torch.Generator().manual_seed(0)
    for name, shape in norms.items():
        theirs = model.get_submodule(name)
        for parameter in theirs.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            assert parameter.dtype == torch.bfloat16
        bias = getattr(theirs, "bias", None)
        norm = replace(architecture.norm, eps=latent.get(name, architecture.norm.eps))
        ours = norm_part(norm, theirs.weight, bias, reference_kernels)
        x = (3 * torch.randn(64, *shape, generator=generator)).bfloat16()
        with torch.no_grad():
            assert torch.equal(ours(x), theirs(x)), name


@shown_rows
@pytest.mark.parametrize("format", ["gptq", pytest.param("awq", marks=pytest.mark.slow), "nf4"])
def test_4_bit_forms_are_written_and_give_the_logits_of_their_dequantized_weights(
    reference: Any, folder_of: Callable[[str], Path], tmp_path: Path, row: str, format: Any
) -> None:
    quantize_checkpoint(
        folder_of(row),
        tmp_path / format,
        format=format,
        group_size=32,
        calibration=None if format == "nf4" else calibration(),
        progress=False,
    )
    checkpoint = open_checkpoint(tmp_path / format)
    reference.assert_same_logits(checkpoint)


@shown_rows
def test_folding_scales_for_awq_changes_nothing(folder_of: Callable[[str], Path], row: str) -> None:
    blocks = DecoderLayers(folder_of(row), CPU, 48)
    torch.manual_seed(0)
    # Some channels are large, so that scales are far from 1.
    hidden = blocks.embed(calibration()) * torch.rand(SIZES["hidden_size"]).mul(3).exp()
    block, layer = blocks.load(0), blocks.architecture.layers[0]
    before = blocks.outputs(block, hidden)
    groups = blocks.groups(0)
    first = [group.linears[0].name for group in groups]
    modules = tuple(dict.fromkeys(group.module for group in groups))
    scaled = scale_block(
        block,
        layer,
        blocks.statistics(block, hidden, first),
        blocks.module_outputs(block, hidden, modules),
        32,
        norm_offset=blocks.architecture.norm.offset or 0.0,
    )
    changes = []
    for name, (weight, _) in scaled.items():
        linear = linear_layer(block, name)
        changes.append(float((weight / linear.weight).max()))
        linear.weight.data = weight
    if any(group.fold for group in groups):
        assert max(changes) > 1.2, "nothing was scaled"
    torch.testing.assert_close(blocks.outputs(block, hidden), before, rtol=1e-4, atol=1e-4)


def adapted_tokens(reference: Any, checkpoint: Checkpoint, adapter: Path, ids: list[int]) -> Any:
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=2, max_rank=8))
    try:
        engine.load_adapter("a", str(adapter))
        return reference.alone(engine, ids, 32, adapter="a"), reference.alone(engine, ids, 32)
    finally:
        engine.stop()


@shown_rows
def test_an_adapter_trained_by_peft_gives_its_outputs(
    reference: Any, folder_of: Callable[[str], Path], tmp_path: Path, row: str
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = folder_of(row)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    # Of a mixture, peft adapts its parameters too: those of stacked experts.
    targets = list(architecture_of(base.config).linear_leaves)
    if base.config.model_type in ("falcon_h1", "nemotron_h"):
        targets.remove("out_proj")  # peft refuses it: the fused kernel of training passes it by
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    ((ids, expected),) = reference.greedy(adapted.eval(), (40,), 32)
    found, without = adapted_tokens(reference, open_checkpoint(folder), tmp_path / "adapter", ids)
    assert found == expected
    assert found != without


def batch_of(*rows: list[list[int]]) -> Batch:
    """Rows of texts, which have a loss on every token."""
    return to_batch([[Example(ids, ids) for ids in row] for row in rows])


@packed_rows
def test_examples_that_are_trained_together_have_the_losses_that_they_have_alone(
    folder_of: Callable[[str], Path], row: str
) -> None:
    model = load_packed_model(open_checkpoint(folder_of(row)), device=CPU, dtype=torch.float32)
    architecture, generator = architecture_of(model.config), torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (40, 9, 30, 21)]
    with torch.no_grad():
        together, padded = batch_loss(model, batch_of(texts), CPU), batch_of(texts[:1], texts[1:2])
        alone = [model(ids := torch.tensor([text]), labels=ids).loss for text in texts]
        alone = [loss * (len(text) - 1) for loss, text in zip(alone, texts, strict=True)]
        torch.testing.assert_close(batch_loss(model, padded, CPU), sum(alone[:2]))
    apart = abs(float(together) / float(sum(alone)) - 1) < 1e-5
    assert packs(architecture, None) is apart
    assert not packs(architecture, False)
    if not apart:
        with pytest.raises(ValueError, match=f"not supported for {architecture.family}"):
            packs(architecture, True)


@pytest.mark.parametrize("row", ["granite 4 hybrid", "bamba", "falcon_h1", "nemotron_h"])
def test_a_kernel_that_passes_adapters_by_is_not_used_in_training(
    folder_of: Callable[[str], Path], row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers takes one for a whole state space in training mode, if mamba_ssm is there."""
    model = load_packed_model(open_checkpoint(folder_of(row)), device=CPU, dtype=torch.float32)
    (code,) = {type(each).__module__ for each in model.modules() if hasattr(each, "A_log")}
    kernel = "mamba2_split_conv1d_scan_combined"

    def fused(projected: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        return projected.new_zeros(*projected.shape[:2], len(options["outproj_weight"]))

    monkeypatch.setattr(sys.modules[code], kernel, fused)
    batch = batch_of([list(range(5, 40))])
    expected = batch_loss(model, batch, CPU)
    training_mode(model)
    assert batch_loss(model, batch, CPU) == expected


@qat_rows
def test_a_model_trained_on_its_grid_is_served_as_it_was_trained(
    reference: Any,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    row: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = []

    def remember(model: Any, *args: Any, **options: Any) -> Any:
        trained.append(model)
        return fake_quantize_model(model, *args, **options)

    monkeypatch.setattr(qat, "fake_quantize_model", remember)
    texts = [list(range(3 + n, 30 + 9 * n)) for n in range(4)]
    examples = [Example(ids, ids) for ids in texts]
    monkeypatch.setattr(qat, "read_examples", lambda *_, **__: examples)
    settings = qat.QatSettings(group_size=32, learning_rate=1e-3, steps=2, max_length=64)
    quantizer = {"settings": settings, "dtype": torch.float32, "progress": False}
    qat.quantization_aware_train(folder_of(row), tmp_path, tmp_path / "qat", **quantizer)
    checkpoint = open_checkpoint(tmp_path / "qat")
    rounded = {name for name, weight in checkpoint.weights() if isinstance(weight, PackedWeight)}
    quantize_checkpoint(
        folder_of(row), tmp_path / "gptq", format="gptq", group_size=32, progress=False
    )
    plain = open_checkpoint(tmp_path / "gptq").weights()
    assert rounded == {name for name, weight in plain if isinstance(weight, PackedWeight)}
    ids = calibration()[:1]
    with torch.no_grad():
        found = load_packed_model(checkpoint, device=CPU, dtype=torch.float32)(ids).logits
        expected = trained[0].train(False)(ids).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()
    reference.assert_same_logits(checkpoint)


@mixture_rows
def test_peft_reads_what_is_trained_here_and_it_can_be_merged(
    reference: Any, folder_of: Callable[[str], Path], tmp_path: Path, row: str
) -> None:
    from peft import PeftModel

    folder = folder_of(row)
    model = load_packed_model(open_checkpoint(folder), device=CPU, dtype=torch.float32)
    about, settings = architecture_of(model.config), LoRASettings(rank=4, alpha=8, dropout=0.1)
    if model.config.model_type == "nemotron_h":  # peft refuses its out_proj
        targets = tuple(name for name in about.linear_leaves if name != "out_proj")
        settings = replace(settings, target_modules=targets)
    torch.manual_seed(0)
    layers = add_lora(model, settings)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    tensors = adapter_tensors(layers)
    save_adapter(tmp_path / "adapter", tensors, settings, str(folder), about)
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    found = {
        name.replace(".default", ""): tensor
        for name, tensor in theirs.state_dict().items()
        if "lora_" in name
    }
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    ((ids, expected),) = reference.greedy(theirs, (40,), 32)
    ours, without = adapted_tokens(reference, open_checkpoint(folder), tmp_path / "adapter", ids)
    assert ours == expected
    assert ours != without
    read, path = load_adapter(tmp_path / "adapter", about), tmp_path / "adapter/adapter_config.json"
    merge_adapter(folder, read, tmp_path / "merged", progress=False)
    engine = reference.start(open_checkpoint(tmp_path / "merged"))
    try:
        assert reference.alone(engine, ids, 32) == expected
    finally:
        engine.stop()
    # As it was written before: by the last parts of names alone.
    names = list(settings.target_modules or about.linear_leaves)
    older = json.loads(path.read_text()) | {"target_modules": names}
    path.write_text(json.dumps(older | {"target_parameters": None}))
    before = load_adapter(tmp_path / "adapter", about)
    assert before.modules.keys() == read.modules.keys() == layers.keys()


def test_targets_that_are_not_trained_are_refused_with_those_that_are(
    folder_of: Callable[[str], Path],
) -> None:
    checkpoint = open_checkpoint(folder_of("qwen3_moe"))
    model = load_packed_model(checkpoint, device=CPU, dtype=torch.float32)
    says = "experts are not trained here. There are q_proj, k_proj, v_proj, o_proj"
    for name in ("gate_proj", "proj"):
        with pytest.raises(ValueError, match=f"'{name}' is not a linear layer .*; {says}"):
            add_lora(model, LoRASettings(target_modules=("q_proj", name)))


@trained_rows
def test_fine_tuning_a_4_bit_base_learns_what_the_engine_then_says(
    reference: Any, folder_of: Callable[[str], Path], tmp_path: Path, row: str
) -> None:
    quantize_checkpoint(
        folder_of(row), tmp_path / "nf4", format="nf4", group_size=32, progress=False
    )
    checkpoint = open_checkpoint(tmp_path / "nf4")
    model = load_packed_model(checkpoint, device=CPU, dtype=torch.float32)
    torch.manual_seed(0)
    settings, about = LoRASettings(rank=8, alpha=8), architecture_of(model.config)
    layers = add_lora(model, settings)
    checkpoint_activations(model)
    text = torch.randint(3, 250, (1, 48), generator=torch.Generator().manual_seed(1))
    batch = batch_of([text[0].tolist()])
    trained = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    training_mode(model)
    for _ in range(60):
        loss = batch_loss(model, batch, CPU) / batch.targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(tmp_path / "adapter", adapter_tensors(layers), settings, "base", about)
    ids, follows = text[0, :16].tolist(), text[0, 16:].tolist()
    found, without = adapted_tokens(reference, checkpoint, tmp_path / "adapter", ids)
    assert found == follows
    assert without != follows
