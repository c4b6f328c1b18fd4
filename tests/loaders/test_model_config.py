"""Models whose config.json has another name than the family that they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from nybble.loaders import CheckpointError, open_checkpoint
from nybble.models import UnsupportedModelError
from nybble.quantizers import quantize_checkpoint

# As internlm3-8b-instruct's, with smaller sizes.
INTERNLM3 = {
    "architectures": ["InternLM3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm3.InternLM3Config",
        "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "model_type": "internlm3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "qkv_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "rope_theta": 50000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 320,
}


@pytest.mark.parametrize("bias", [False, True])
def test_internlm_3_is_llama_under_another_name(
    tmp_path: Path, tiny_model: Callable[..., Path], reference: Any, bias: bool
) -> None:
    settings = INTERNLM3 | {"bias": bias, "qkv_bias": bias}
    llama = {name: settings[name] for name in settings if name not in ("auto_map", "model_type")}
    config = LlamaConfig.from_dict(llama | {"attention_bias": bias, "mlp_bias": bias})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    folder = tmp_path / "internlm3"
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    ids = torch.arange(3, 63)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    found = reference.our_logits(open_checkpoint(folder), ids, torch.float32)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    # What is derived from it can be read by every reader of Llama.
    quantize_checkpoint(folder, tmp_path / "nf4", format="nf4", progress=False)
    assert AutoConfig.from_pretrained(tmp_path / "nf4").model_type == "llama"
    reference.assert_same_logits(open_checkpoint(tmp_path / "nf4"))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("kimi_linear", r"\(latent attention in layouts of their own\); supported are apertus"),
        ("jamba", r"is not supported \(state spaces in layouts of their own\); "),
        (["llama"], "model_type None is not supported; "),
    ],
)
def test_what_a_family_would_need_is_said(tmp_path: Path, family: Any, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UnsupportedModelError, match=reason):
        open_checkpoint(tmp_path)


def test_biases_that_llama_cannot_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(INTERNLM3 | {"qkv_bias": True}))
    with pytest.raises(UnsupportedModelError, match="qkv_bias is True and bias is False"):
        open_checkpoint(tmp_path)


def test_attention_to_later_tokens_is_refused_by_name(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    written = config.to_dict() | {"is_causal": False, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UnsupportedModelError, match="is_causal: false"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("architectures", [True, "LlamaModel", [{}], {"LlamaModel": 1}])
def test_architectures_that_are_no_names_are_refused(tmp_path: Path, architectures: object) -> None:
    written = LlamaConfig().to_dict() | {"model_type": "llama", "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=r"architectures is .*expected names"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_types": ["full_attention", "diagonal"]},
            "layer_types has 'diagonal', which is no",
        ),
        ({"layer_types": ["full_attention"]}, "(?i)layer_types"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 15}, "requires an even rotary dimension, but got `head_dim`=15"),
        ({"hidden_size": -64}, "hidden_size|hidden size"),
    ],
)
def test_a_setting_that_transformers_refuses_is_named_with_the_file(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for family in ("qwen3", "llama"):
        sizes = {"num_hidden_layers": 2, "head_dim": 16, "hidden_size": 64}
        config = AutoConfig.for_model(family, **sizes, num_attention_heads=4).to_dict() | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message) as refused:
            open_checkpoint(tmp_path)
        assert str(refused.value).startswith(f"{tmp_path / 'config.json'}")
        assert "validator" not in str(refused.value)


@pytest.mark.parametrize("family", ["llama4", "qwen3_vl_moe"])
def test_a_multimodal_model_that_is_not_known_is_told_which_are(
    tmp_path: Path, family: str
) -> None:
    config = {"model_type": family, "text_config": {"model_type": f"{family}_text"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="language models of gemma3, llava, mistral3"):
        open_checkpoint(tmp_path)
