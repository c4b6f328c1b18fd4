"""The language model of multimodal checkpoints, against transformers on the same texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoConfig, AutoModelForImageTextToText

from nybble.loaders import open_checkpoint, save_packed
from nybble.models import UnsupportedModelError
from nybble.quantizers import quantize_checkpoint

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
TILES = {"depth": 1, "num_heads": 2, "out_hidden_size": 64}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
# A wrapper's own settings, its language model and its vision tower.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"mm_tokens_per_image": 4},
        {"model_type": "gemma3_text", "sliding_window": 24, "query_pre_attn_scalar": 16},
        {"model_type": "siglip_vision_model"},
    ),
    "mistral3": (
        {"tie_word_embeddings": False},
        {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
        {"model_type": "pixtral", "head_dim": 16},
    ),
    "mistral3 of ministral3": (
        {"tie_word_embeddings": False},
        {
            "model_type": "ministral3",
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.5,
            },
        },
        {"model_type": "pixtral", "head_dim": 16},
    ),
    "llava": (
        {"tie_word_embeddings": False},
        {"model_type": "llama", "tie_word_embeddings": False},
        {"model_type": "clip_vision_model"},
    ),
    "qwen3_5": (
        {},
        {"model_type": "qwen3_5_text", **DELTA_NET},
        {"model_type": "qwen3_5_vision", **TILES},
    ),
    "qwen3_5_moe": (
        {},
        {"model_type": "qwen3_5_moe_text", **DELTA_NET, **EXPERTS},
        {"model_type": "qwen3_5_moe_vision", **TILES},
    ),
}


def written(family: str, folder: Path, tokenizer: Path) -> Any:
    own, text, vision = ROWS[family]
    config = AutoConfig.for_model(
        family.partition(" ")[0],
        **own,
        text_config=TEXT | text,
        vision_config=VISION | vision,
        image_token_index=300,
        image_token_id=300,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return model


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[None]).logits[0]
    return logits


@pytest.mark.parametrize("family", ROWS)
def test_texts_are_computed_as_the_whole_model_does(
    tmp_path: Path, tiny_model: Callable[..., Path], reference: Any, family: str
) -> None:
    model = written(family, tmp_path, tiny_model())
    ids = torch.randint(3, 250, (60,), generator=torch.Generator().manual_seed(1))
    expected = logits_of(model, ids)
    found = reference.our_logits(open_checkpoint(tmp_path), ids, torch.float32)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.fixture
def gemma(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    written("gemma3", tmp_path / "gemma", tiny_model())
    return tmp_path / "gemma"


def test_other_parts_are_passed_over_with_a_line(
    gemma: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(gemma)
    assert checkpoint.config.model_type == "gemma3_text"
    dict(checkpoint.weights())
    assert "tensors such as multi_modal_projector." in caplog.text
    assert "texts are served, nothing else" in caplog.text


def test_names_may_be_those_of_newer_files(gemma: Path, reference: Any) -> None:
    """transformers 5 writes the names of older versions; its own are these."""
    expected = dict(open_checkpoint(gemma).weights())
    path = gemma / "model.safetensors"
    newer = {
        "model." + name.replace("language_model.model.", "language_model."): tensor
        for name, tensor in load_file(path).items()
    }
    assert "model.language_model.norm.weight" in newer
    assert any(name.startswith("model.vision_tower.") for name in newer)
    save_file(newer, path)
    assert dict(open_checkpoint(gemma).weights()).keys() == expected.keys()
    save_file({**newer, "model.sound_tower.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"does not use, the first is model\.sound_tower"):
        reference.our_logits(open_checkpoint(gemma), torch.arange(3), torch.float32)


def test_an_index_may_name_other_parts_that_no_file_has(gemma: Path) -> None:
    expected = dict(open_checkpoint(gemma).weights())
    weight_map = dict.fromkeys(load_file(gemma / "model.safetensors"), "model.safetensors")
    weight_map["vision_tower.embeddings.position_ids"] = "model.safetensors"
    (gemma / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert dict(open_checkpoint(gemma).weights()).keys() == expected.keys()


def test_a_tied_matrix_may_have_the_output_layers_name(
    tmp_path: Path, tiny_model: Callable[..., Path], reference: Any
) -> None:
    model = written("gemma3", tmp_path, tiny_model())
    ids = torch.arange(3, 40)
    expected = logits_of(model, ids)
    save_model(model, str(tmp_path / "model.safetensors"), {"format": "pt"})
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "lm_head.weight" in names
    assert not any("embed_tokens" in name for name in names)
    found = reference.our_logits(open_checkpoint(tmp_path), ids, torch.float32)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_what_is_derived_is_the_language_model_alone(
    gemma: Path, tmp_path: Path, reference: Any
) -> None:
    quantize_checkpoint(gemma, tmp_path / "nf4", format="nf4", group_size=32, progress=False)
    assert json.loads((tmp_path / "nf4/config.json").read_text())["model_type"] == "gemma3_text"
    reference.assert_same_logits(open_checkpoint(tmp_path / "nf4"))
    save_packed(open_checkpoint(gemma), tmp_path / "packed", layout="rows", progress=False)
    names = {name for name, _ in open_checkpoint(tmp_path / "packed").weights()}
    assert "model.layers.0.mlp.down_proj" in names


def test_a_language_model_of_another_family_is_refused_by_name(gemma: Path) -> None:
    config = json.loads((gemma / "config.json").read_text())
    config["text_config"]["model_type"] = "mamba"
    (gemma / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported"):
        open_checkpoint(gemma)
