"""Logits and greedy tokens equal those of transformers on the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.loaders import Checkpoint, open_checkpoint
from nybble.quantizers import InFlight, quantize_checkpoint

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def random_model(folder: Path, tokenizer_from: Path, family: str, **settings: Any) -> Path:
    """A folder with a small random model of any family the decoder computes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        **settings,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


@pytest.mark.parametrize("rope", list(ROPE))
def test_rope_variants(
    reference: Any, tmp_path: Path, tiny_model: Callable[..., Path], rope: str
) -> None:
    folder = random_model(tmp_path, tiny_model(), "llama", rope_parameters=ROPE[rope])
    reference.assert_same_logits(open_checkpoint(folder))


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Callable[[str], Checkpoint]:
    def build(format: str) -> Checkpoint:
        if format == "nf4 in flight, 8-bit head":
            return InFlight(open_checkpoint(tiny_model()), layers="nf4", head="int8")
        folder = tmp_path_factory.mktemp("quantized") / format
        quantize_checkpoint(tiny_model(), folder, format=format, group_size=64, progress=False)  # type: ignore[arg-type]
        return open_checkpoint(folder)

    return build


@pytest.mark.parametrize(
    "format",
    [
        "gptq",
        "nf4 in flight, 8-bit head",
        *(pytest.param(format, marks=pytest.mark.slow) for format in ("awq", "nf4")),
    ],
)
def test_quantized_checkpoints_give_the_logits_and_64_greedy_tokens(
    reference: Any, quantized: Callable[[str], Checkpoint], format: str
) -> None:
    checkpoint = quantized(format)
    reference.assert_same_logits(checkpoint)
    model = reference.transformers_model(checkpoint)
    engine = reference.start(checkpoint)
    try:
        for ids, tokens in reference.greedy(model, (5, 35, 65), 64):
            assert reference.alone(engine, ids, 64) == tokens
    finally:
        engine.stop()


def test_bfloat16_kernels_stay_within_the_rounding_of_bfloat16(
    reference: Any,
    quantized: Callable[[str], Checkpoint],
) -> None:
    """Compared with float32 arithmetic on the same weights, no worse than 1.5 × transformers'."""
    checkpoint = quantized("gptq")
    ids = torch.randint(0, 250, (64,), generator=torch.Generator().manual_seed(1))
    model = reference.transformers_model(checkpoint)
    with torch.no_grad():
        exact = model(ids[None]).logits[0]
        theirs = model.to(torch.bfloat16)(ids[None]).logits[0].float()
    ours = reference.our_logits(checkpoint, ids, torch.bfloat16)
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_a_checkpoint_without_a_head_needs_tied_embeddings(
    reference: Any, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(tiny_model(tie_word_embeddings=True), tmp_path / "m"))
    reference.assert_same_logits(open_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"no tensor lm_head\.weight"):
        reference.our_logits(open_checkpoint(folder), torch.tensor([1]), torch.float32)
