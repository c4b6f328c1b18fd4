"""Adapters mean what peft says they mean, and what is not supported is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.loaders import AdapterError, adapter, adapter_config, load_adapter, resolve_adapter
from nybble.models import Architecture, architecture_of

DOWN = "model.layers.0.mlp.down_proj"
WEIGHTS = "adapter_model.safetensors"
ONE = torch.ones(4, 128)
MORE = torch.zeros(324, 128)


@pytest.fixture
def architecture(tiny_model: Callable[..., Path]) -> Architecture:
    return architecture_of(AutoConfig.from_pretrained(tiny_model()))


@pytest.fixture
def editable(tiny_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapter(), tmp_path / "adapter"))


def configure(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    renamed = {change(key): tensor for key, tensor in tensors.items()}
    save_file({k: v for k, v in renamed.items() if k is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5},
        {"target_modules": r".*\.1\.mlp\.(up|gate)_proj"},
        {"target_modules": "all-linear", "use_rslora": True},
        {
            "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"o_proj": 3},
        },
        {"layers_to_transform": [1], "target_modules": ["v_proj"]},
        {"layers_to_transform": 0, "layers_pattern": "layers", "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": r".*(q_proj|embed_tokens)", "modules_to_save": ["embed_tokens"]},
    ],
    ids=[
        *("all", "some", "regex", "all-linear rslora", "patterns", "one layer", "excluded"),
        *("saved head", "saved embedding"),
    ],
)
def test_every_module_changes_by_what_peft_adds(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    family: str,
    options: dict[str, Any],
) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_model(family=family), dtype=torch.float32)
    folder = tiny_adapter(family, **options)
    adapted = PeftModel.from_pretrained(base, folder)
    expected = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A
    }
    adapter = load_adapter(folder, architecture_of(base.config))
    assert adapter.modules.keys() == expected.keys()
    for name, module in adapter.modules.items():
        torch.testing.assert_close(module.scale * module.b @ module.a, expected[name])


def test_all_linear_means_the_decoders_layers(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """peft writes a list, but reads the word."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    folder = Path(shutil.copytree(tiny_adapter(target_modules="all-linear"), tmp_path / "adapter"))
    configure(folder, target_modules="All-Linear")
    adapted = PeftModel.from_pretrained(base, folder)
    adapter = load_adapter(folder, architecture_of(base.config))
    assert len(adapter.modules) == sum(
        ".lora_A.default." in n for n, _ in adapted.named_parameters()
    )
    assert adapter.head is None
    assert adapter.embedding is None


@pytest.mark.parametrize(
    "spelling",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("base_model.model.model.", "base_model.model."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
    ids=["named", "no prefix", "headless base", "compiled"],
)
def test_the_names_of_other_peft_versions_are_read(
    editable: Path, architecture: Architecture, spelling: Callable[[str], str]
) -> None:
    expected = load_adapter(editable, architecture)
    rename(editable, spelling)
    found = load_adapter(editable, architecture)
    assert found.modules.keys() == expected.modules.keys()
    for name, module in found.modules.items():
        assert torch.equal(module.a, expected.modules[name].a)
        assert torch.equal(module.b, expected.modules[name].b)
    assert found.digest != expected.digest


@pytest.mark.parametrize("name", adapter.OWN_FILES)
def test_the_stamp_of_a_folder_tells_that_a_file_has_come_or_changed_or_gone(
    editable: Path, name: str
) -> None:
    file = editable / name
    without = adapter.files_stamp(str(editable))
    file.write_text("a")
    first = adapter.files_stamp(str(editable))
    file.write_text("of another size")
    second = adapter.files_stamp(str(editable))
    assert adapter.files_stamp(str(editable)) == second
    assert len({without, first, second}) == 3
    file.unlink()
    assert adapter.files_stamp(str(editable)) == without


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_the_base_is_read_once_peft_has_converted_it(
    tiny_model: Callable[..., Path], architecture: Architecture, tmp_path: Path, init: str
) -> None:
    """As the error for one that is not converted says."""
    from peft import LoraConfig, get_peft_model

    before = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    adapted = get_peft_model(base, config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(tmp_path / "initial")
        adapted.peft_config["default"].init_lora_weights = init
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "as it is")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "as it is", architecture)
    adapted.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    found = load_adapter(tmp_path / "converted", architecture).modules
    merged = adapted.merge_and_unload()
    assert len(found) == len(architecture.layers)
    for name, module in found.items():
        expected = merged.get_submodule(name).weight
        result = module.merged(before.get_submodule(name).weight)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(expected, before.get_submodule(name).weight, atol=0.01)


def test_a_pickled_file_is_not_read_and_the_error_says_how_to_convert_it(
    editable: Path, architecture: Architecture
) -> None:
    tensors = load_file(editable / WEIGHTS)
    (editable / WEIGHTS).unlink()
    torch.save(tensors, editable / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin.*save_pretrained"):
        load_adapter(editable, architecture)


def test_settings_of_other_tools_are_left_out_with_a_warning(
    editable: Path, architecture: Architecture, caplog: pytest.LogCaptureFixture
) -> None:
    notes = {"model_type": "qwen2", "training_notes": {"loss": 0.5}, "empty": None}
    configure(editable, **notes, fan_in_fan_out=True, velora_config={"x": 1})
    assert load_adapter(editable, architecture).rank == 4
    (message,) = caplog.messages
    assert message.endswith("model_type, training_notes")


def test_every_setting_of_peft_is_known() -> None:
    """A new one changes the result, or does not: somebody has to say which."""
    from peft import AdaLoraConfig, LoraConfig, VeraConfig

    known = adapter_config._READ | adapter_config._NO_EFFECT | adapter_config._REFUSED.keys()
    for settings in (LoraConfig, AdaLoraConfig, VeraConfig):
        assert {field.name for field in dataclasses.fields(settings)} <= known


@pytest.mark.parametrize(
    ("spelling", "around"),
    [
        (
            lambda key: key.replace("model.layers.", "model.language_model.layers."),
            "model.language_model.",
        ),
        (
            lambda key: key.replace("model.layers.", "language_model.model.layers."),
            "language_model.model.",
        ),
        (lambda key: key.replace("model.layers.", "thinker.model.layers."), "thinker.model."),
    ],
    ids=["language_model inside", "language_model outside", "thinker"],
)
def test_an_adapter_trained_within_a_multimodal_model_is_read(
    editable: Path,
    architecture: Architecture,
    spelling: Callable[[str], str],
    around: str,
) -> None:
    """By that model's names, which the settings' patterns speak of."""
    expected = load_adapter(editable, architecture)
    rename(editable, lambda key: spelling(key).replace("base_model.model.base", "base"))
    configure(
        editable,
        target_modules=rf"(?!.*visual){re.escape(around)}layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        alpha_pattern={rf"{re.escape(around)}layers\.0\.mlp\.up_proj": 99},
    )
    found = load_adapter(editable, architecture)
    assert found.modules.keys() == expected.modules.keys()
    assert found.modules["model.layers.0.mlp.up_proj"].scale == 99 / 4
    assert (
        found.modules["model.layers.1.mlp.up_proj"].scale
        == expected.modules["model.layers.1.mlp.up_proj"].scale
    )


@pytest.mark.parametrize("around", ["visual.blocks.0.", "vision_tower.encoder.", "audio_tower."])
def test_an_adapter_for_another_part_of_a_multimodal_model_is_refused(
    editable: Path, architecture: Architecture, around: str
) -> None:
    rename(editable, lambda key: key.replace("model.layers.", f"model.{around}layers."))
    with pytest.raises(AdapterError, match="which the base model does not have"):
        load_adapter(editable, architecture)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "LOHA"},
            "peft_type 'LOHA' is not supported; supported are LORA, ADALORA, VERA, IA3",
        ),
        ({"use_dora": True, "target_parameters": ["x"]}, "use_dora with target_parameters has no"),
        ({"lora_bias": True, "target_parameters": ["x"]}, "lora_bias with target_parameters has"),
        ({"peft_type": "VERA"}, "has no vera_A and vera_B: peft would draw them at random again"),
        ({"peft_type": "VERA", "bias": "all"}, "VeRA with bias 'all' is not supported"),
        ({"peft_type": "IA3"}, f"has a lora_A for {DOWN}, which its adapter_config.json does not"),
        ({"peft_type": "IA3", "target_parameters": ["x"]}, "IA3 has no target_parameters in peft"),
        ({"peft_type": "ADALORA", "init_r": 4}, f"has no lora_E for {DOWN}"),
        ({"peft_type": "ADALORA", "lora_alpha": 0}, "lora_alpha is 0.0, AdaLoRA needs more"),
        ({"peft_type": "ADALORA", "target_parameters": ["x"]}, "AdaLoRA has no target_parameters"),
        ({"peft_type": "ADALORA", "rank_pattern": {"q": 2}}, "has a setting of the wrong type"),
        ({"use_dora": True}, f"has no lora_magnitude_vector for {DOWN}"),
        ({"use_dora": True, "lora_bias": True}, "use_dora together with lora_bias has no meaning"),
        ({"bias": "all"}, "has no bias for model.layers.0.self_attn.k_proj, which its settings"),
        ({"bias": "lora_only"}, "has no bias for model.layers.0.self_attn.k_proj, which its"),
        ({"bias": "most"}, "bias 'most' is not supported, expected one of none, lora_only, all"),
        ({"modules_to_save": ["lm_head"]}, "has no weight for lm_head, which its modules_to_save"),
        ({"modules_to_save": ["o_proj"]}, "modules_to_save has 'o_proj', which is not supported"),
        ({"modules_to_save": ["score"]}, "modules_to_save has 'score', which is not supported"),
        ({"trainable_token_indices": {"wte": [1]}}, "trainable_token_indices has 'wte', which is"),
        ({"trainable_token_indices": [1]}, "has no trainable_tokens_delta for model.embed_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base weights"),
        ({"lora_bias": True}, f"has no lora_bias for {DOWN}"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
        ({"use_qalora": True}, "use_qalora is True, which is not supported"),
        (
            {"alora_invocation_tokens": [1], "use_dora": True},
            "use_dora with alora_invocation_tokens",
        ),
        ({"alora_invocation_tokens": [1], "bias": "all"}, "has no bias for model.layers.0"),
        ({"alora_invocation_tokens": "<a>"}, "has a setting of the wrong type"),
        ({"r": 513}, "rank 513 is not supported, expected 1 to 512"),
        ({"r": "many"}, "has a setting of the wrong type"),
        ({"target_modules": "(q_proj"}, "has a setting of the wrong type"),
        ({"target_modules": r"((.|..|...)+)+(?<=\d\d)"}, "takes over 1.0 s to match model.layers"),
        ({"rank_pattern": {r"(.|\w|[a-z.])*(?<=\d)": 2}}, "takes over 1.0 s to match"),
        ({"r": 8}, f"{DOWN}.lora_A.weight has shape (4, 256), expected (8, 256)"),
        ({"target_modules": ["q_proj"]}, f"has tensors for {DOWN}, not one of its"),
        ({"layers_to_transform": [1]}, f"has tensors for {DOWN}, not one of its"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(
    editable: Path, architecture: Architecture, changes: dict[str, object], message: str
) -> None:
    rename(editable, lambda key: key)
    configure(editable, **changes)
    with pytest.raises(AdapterError, match=re.escape(message)):
        load_adapter(editable, architecture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda key: key.replace("layers.1.", "layers.7."),
            "is for model.layers.7.mlp.down_proj, but the base model has 2 layers",
        ),
        (
            lambda key: key.replace("up_proj", "w1"),
            "mlp.w1, which cannot have an adapter here; down_proj, gate_proj",
        ),
        (
            lambda key: key.replace("self_attn.q_proj", "attention.q_proj"),
            "which the base model does not have; it has e.g. model.layers.0.self_attn.q_proj",
        ),
        (
            lambda key: None if "layers.1.mlp.up_proj.lora_B" in key else key,
            "has no lora_B for model.layers.1.mlp.up_proj",
        ),
        (
            lambda key: None if "layers.1." in key else key,
            "has no lora_A for model.layers.1.self_attn.q_proj, which its target_modules select",
        ),
        (
            lambda key: key.replace("q_proj.lora_A.weight", "q_proj.lora_C.weight"),
            "q_proj.lora_C.weight is not supported; supported are lora_A, lora_B",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_named(
    editable: Path,
    architecture: Architecture,
    change: Callable[[str], str | None],
    message: str,
) -> None:
    rename(editable, change)
    with pytest.raises(AdapterError, match=re.escape(message)):
        load_adapter(editable, architecture)


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_B.bias", "base_layer.bias"])
def test_a_tensor_that_the_settings_do_not_speak_of_is_refused(
    editable: Path, architecture: Architecture, part: str
) -> None:
    tensors = load_file(editable / WEIGHTS)
    tensors[f"base_model.model.{DOWN}.{part}"] = torch.ones(128)
    save_file(tensors, editable / WEIGHTS)
    with pytest.raises(AdapterError, match=rf"for {DOWN}, which its adapter_config\.json does not"):
        load_adapter(editable, architecture)


@pytest.mark.parametrize(
    ("options", "field", "spellings"),
    [
        (
            {"use_dora": True},
            "magnitude",
            ("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
        ),
        ({"lora_bias": True}, "added_bias", ("lora_B.bias", "lora_B.default.bias")),
        ({"bias": "lora_only"}, "own_bias", ("base_layer.bias", "bias")),
    ],
)
def test_magnitudes_and_biases_are_read_in_the_spelling_of_every_version(
    tiny_adapter: Callable[..., Path],
    architecture: Architecture,
    tmp_path: Path,
    options: dict[str, Any],
    field: str,
    spellings: tuple[str, str],
) -> None:
    module = "model.layers.1.self_attn.q_proj"
    folder = Path(shutil.copytree(tiny_adapter(**options), tmp_path / "adapter"))
    tensors = load_file(folder / WEIGHTS)
    rename(folder, lambda key: key.replace(*spellings))
    assert load_file(folder / WEIGHTS).keys() != tensors.keys()
    found = load_adapter(folder, architecture).modules[module]
    expected = tensors[f"base_model.model.{module}.{spellings[0]}"]
    assert torch.equal(getattr(found, field), expected)


def test_changes_of_embeddings_output_layer_and_norms_are_what_peft_merges(
    tiny_adapter: Callable[..., Path], tiny_model: Callable[..., Path], architecture: Architecture
) -> None:
    from peft import PeftModel

    options: dict[str, Any] = {
        "target_modules": ["embed_tokens", "q_proj"],
        "trainable_token_indices": {"lm_head": [9, 5]},
        "modules_to_save": ["norm"],
        "use_rslora": True,
    }
    folder = tiny_adapter(**options)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    embedding, head = base.model.embed_tokens.weight.clone(), base.lm_head.weight.clone()
    found = load_adapter(folder, architecture)
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    assert found.embedding is not None
    assert found.head is not None
    torch.testing.assert_close(
        found.embedding.merged(embedding), merged["model.embed_tokens.weight"]
    )
    torch.testing.assert_close(found.head.merged(head), merged["lm_head.weight"])
    assert sorted(found.norms) == sorted(name for name in merged if "norm" in name)
    for name, tensor in found.norms.items():
        assert torch.equal(tensor, merged[name])


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (
            {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
            lambda tensors: None,
            "DoRA on model.embed_tokens is not supported",
        ),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            lambda tensors: tensors.pop("base_model.model.model.embed_tokens.lora_embedding_B"),
            "has no lora_embedding_B for model.embed_tokens, which its target_modules select",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": ONE}),
            "has base_model.model.lm_head.lora_A.weight, which its adapter_config.json does not",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": MORE}),
            "has 324 tokens, the base model 320, and nothing for model.embed_tokens from token 320",
        ),
        (
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": MORE}),
            "embed_tokens.weight has 320 tokens and base_model.model.lm_head.weight 324",
        ),
        (
            {"trainable_token_indices": [5, 6]},
            lambda tensors: tensors.update(
                {"base_model.model.model.embed_tokens.token_adapter.base_layer.weight": MORE}
            ),
            "has 324 tokens, the base model 320, and nothing for lm_head from token 320",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            lambda tensors: tensors["base_model.model.lm_head.weight"].fill_(float("nan")),
            "lm_head.weight has values that are not finite",
        ),
        (
            {"trainable_token_indices": [5, 6]},
            lambda tensors: tensors.update(
                {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": ONE}
            ),
            "trainable_tokens_delta has shape (4, 128), expected (2, 128)",
        ),
        (
            {},
            lambda tensors: tensors.update({"base_model.model.model.norm.weight": ONE[0]}),
            "has base_model.model.model.norm.weight, which its adapter_config.json does not speak",
        ),
    ],
)
def test_what_does_not_fit_the_ends_is_named(
    tiny_adapter: Callable[..., Path],
    architecture: Architecture,
    tmp_path: Path,
    options: dict[str, Any],
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    folder = Path(shutil.copytree(tiny_adapter(**options), tmp_path / "adapter"))
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=re.escape(message)):
        load_adapter(folder, architecture)


def test_the_first_tensor_of_a_wrong_shape_is_named_with_both_shapes(
    editable: Path, tiny_model: Callable[..., Path]
) -> None:
    wide = architecture_of(AutoConfig.from_pretrained(tiny_model(hidden_size=192)))
    message = r"layers\.0\.mlp\.down_proj\.lora_A\.weight has shape \(4, 256\), expected \(4, 384\)"
    with pytest.raises(AdapterError, match=message):
        load_adapter(editable, wide)


def test_values_that_are_not_finite_are_refused(editable: Path, architecture: Architecture) -> None:
    tensors: dict[str, Tensor] = load_file(editable / WEIGHTS)
    key = next(iter(tensors))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, editable / WEIGHTS)
    with pytest.raises(AdapterError, match=re.escape(f"{key} has values that are not finite")):
        load_adapter(editable, architecture)


def test_values_beyond_16_bits_are_refused(editable: Path, architecture: Architecture) -> None:
    tensors: dict[str, Tensor] = load_file(editable / WEIGHTS)
    key = next(iter(tensors))
    tensors[key][0, 0] = -70000.0
    save_file(tensors, editable / WEIGHTS)
    with pytest.raises(AdapterError, match=re.escape(f"{key} has a value of 7e+04, and 65504")):
        load_adapter(editable, architecture)


@pytest.mark.parametrize(
    ("changes", "module"),
    [
        ({"lora_alpha": 1e12}, "model.layers.0"),
        ({"lora_alpha": -1e300}, "model.layers.0"),
        ({"lora_alpha": 1e12, "use_rslora": True}, "model.layers.0"),
        ({"alpha_pattern": {r"layers\.1\.mlp\.up_proj": 1e12}}, "model.layers.1.mlp.up_proj"),
    ],
)
def test_a_scale_beyond_16_bits_is_refused(
    editable: Path, architecture: Architecture, changes: dict[str, Any], module: str
) -> None:
    configure(editable, **changes)
    message = rf"what it adds to {re.escape(module)}\S* is scaled by .*lora_alpha"
    with pytest.raises(AdapterError, match=message):
        load_adapter(editable, architecture)


def test_a_scale_beyond_16_bits_of_an_end_is_refused(
    tiny_adapter: Callable[..., Path], tmp_path: Path, architecture: Architecture
) -> None:
    for module, name in (("lm_head", "the output layer"), ("embed_tokens", "the embedding")):
        own = tiny_adapter(target_modules=["q_proj", module])
        folder = Path(shutil.copytree(own, tmp_path / module))
        load_adapter(folder, architecture)
        configure(folder, alpha_pattern={module: 1e12})
        with pytest.raises(AdapterError, match=f"what it adds to {name} is scaled by"):
            load_adapter(folder, architecture)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is not JSON that can be read"),
        ('{"r": ' + "9" * 5000 + "}", "is not JSON that can be read"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "alpha is nan, expected a finite number"),
        ('{"peft_type": "LORA", "lora_alpha": "16"}', "lora_alpha is '16', expected a number"),
        ('{"peft_type": "LORA", "lora_alpha": true}', "lora_alpha is True, expected a number"),
        ('{"peft_type": "LORA", "alpha_pattern": {"a": "1"}}', "alpha_pattern: a is '1', expected"),
        ('{"peft_type": "LORA", "r": true}', "r is True, expected a number"),
        ('{"peft_type": "LORA", "r": 8.5}', "r is 8.5, expected a whole number"),
        ('{"peft_type": "LORA", "rank_pattern": {"a": "1"}}', "rank_pattern: a is '1', expected"),
        ('{"peft_type": "LORA", "lora_alpha": 1e400}', "alpha is inf, expected a finite number"),
        (
            '{"peft_type": "LORA", "alpha_pattern": {"q_proj": -1e400}}',
            "alpha is -inf, expected a finite number",
        ),
    ],
)
def test_a_config_that_nothing_can_be_read_or_computed_from_is_refused(
    editable: Path, architecture: Architecture, content: str, message: str
) -> None:
    (editable / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=message):
        load_adapter(editable, architecture)


@pytest.mark.parametrize("part", ["²", "9" * 5000])
def test_a_tensors_name_may_have_any_digits(
    editable: Path, architecture: Architecture, part: str
) -> None:
    rename(editable, lambda key: key.replace("layers.1.", f"layers.{part}."))
    with pytest.raises(AdapterError, match="which the base model does not have"):
        load_adapter(editable, architecture)


def test_a_truncated_file_is_named(editable: Path, architecture: Architecture) -> None:
    file = editable / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is truncated"):
        load_adapter(editable, architecture)


def test_an_adapter_is_found_by_its_folder_only(tmp_path: Path, editable: Path) -> None:
    assert resolve_adapter(str(editable)) == editable
    with pytest.raises(AdapterError, match="no such folder"):
        resolve_adapter(str(tmp_path / "nothing"))
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        resolve_adapter(str(tmp_path))


def test_a_hub_name_is_downloaded_without_what_an_adapter_does_not_need(
    tmp_path: Path, editable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(name: str, *, allow_patterns: list[str], tqdm_class: type) -> str:
        if name != "org/poet":
            raise LocalEntryNotFoundError("cannot find it")
        assert sorted(allow_patterns) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "added_tokens.json",
            "chat_template.jinja",
            "generation_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        return str(editable)

    monkeypatch.setattr(adapter, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter("org/poet") == editable
    with pytest.raises(AdapterError, match="not had from the hub: cannot find it"):
        resolve_adapter("org/nobody")


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_an_output_layer_s_own_bias_is_refused_with_a_way_out(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = AutoConfig.for_model("phimoe", **sizes, **heads, lm_head_bias=True)
    model = AutoModelForCausalLM.from_config(config)
    settings = LoraConfig(r=2, target_modules=["q_proj"], **options)
    get_peft_model(model, settings).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"has a bias of its own for lm_head, .* with peft's"):
        load_adapter(tmp_path, architecture_of(config))
