"""Merging adapters that change the embedding, the output layer or norms."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import AdapterConfig, prompt_reader
from nybble.engine.prompt_reader import chunked_logits
from nybble.loaders import AdapterError, load_adapter, open_checkpoint
from nybble.loaders.adapter_combine import combine_adapters
from nybble.models import architecture_of
from nybble.quantizers import (
    merge_adapter,
    merge_divergence,
    quantize_checkpoint,
    rounding_divergence,
)

KINDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens"]},
    "tied": {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 50, 8]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_merged_16_bit_model_equals_pefts(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    tied: bool,
) -> None:
    """A tied output layer is saved by itself only if it is no longer the embedding."""
    source, folder = tiny_model(tie_word_embeddings=tied), tiny_adapter(tied=tied, **KINDS[kind])
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        expected = model(ids).logits
    adapter = load_adapter(folder, architecture_of(AutoConfig.from_pretrained(source)))
    merge_adapter(source, adapter, tmp_path / "merged", progress=False)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    stays = tied and kind in ("tied", "tokens")
    assert ("lm_head.weight" in found) is not stays
    assert (
        json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
        is stays
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        error = (merged(ids).logits - expected).abs().max()
    assert error < 0.05 * expected.abs().max()
    if not tied:
        state = model.merge_and_unload().state_dict()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.float(), state[name], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_4_bit_base_merged_with_calibration_says_what_both_say(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    kind: str,
) -> None:
    source = tmp_path / "base"
    quantize_checkpoint(tiny_model(), source, format="gptq", group_size=32, progress=False)
    folder = tiny_adapter(**KINDS[kind])
    adapter = load_adapter(folder, open_checkpoint(source).architecture)
    text = torch.randint(3, 300, (4, 40), generator=torch.Generator().manual_seed(0))
    merge_adapter(source, adapter, tmp_path / "merged", calibration=text, progress=False)
    options: dict[str, Any] = {"length": 40, "dtype": torch.float32}
    effect = merge_divergence(source, adapter, source, text.flatten(), **options)
    left = merge_divergence(source, adapter, tmp_path / "merged", text.flatten(), **options)
    assert effect > 0.01
    assert left < 0.5 * effect


@pytest.mark.parametrize("kind", [*KINDS, "both"])
def test_the_cost_of_8_bits_is_what_an_engine_says_differently(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """By the logits with which engines read the same text with the adapter in 16 bits and in 8."""
    both = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    source, folder = tiny_model(), tiny_adapter(**(KINDS | {"both": both})[kind])
    adapter = load_adapter(folder, open_checkpoint(source).architecture)
    text = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0))
    found = rounding_divergence(source, adapter, text, length=40, dtype=torch.float32)
    effect = merge_divergence(source, adapter, source, text, length=40, dtype=torch.float32)
    assert found < 0.05 * effect
    seen: list[torch.Tensor] = []

    def spied(*arguments: Any) -> Any:
        for first, logits in chunked_logits(*arguments):
            seen.append(logits.log_softmax(-1))
            yield first, logits

    monkeypatch.setattr(prompt_reader, "chunked_logits", spied)
    read = {}
    for dtype in ("auto", "int8"):
        engine = reference.start(
            open_checkpoint(source), adapters=AdapterConfig(1, 4, dtype=dtype), max_model_len=64
        )
        try:
            engine.load_adapter("a", str(folder))
            prompt = [*text.tolist(), 5]  # of the last token nothing is reported
            asyncio.run(
                reference.collect(engine, "r", prompt, adapter="a", max_tokens=1, prompt_logprobs=0)
            )
        finally:
            engine.stop()
        read[dtype] = torch.cat(seen)
        seen.clear()
    exact, rounded = read["auto"], read["int8"]
    assert len(exact) == len(text)
    expected = (exact.exp() * (exact - rounded)).sum(-1).mean()
    torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=0.02, atol=1e-6)


def test_low_rank_changes_of_the_ends_combine_as_in_peft(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    target_modules = ["lm_head", "embed_tokens", "q_proj"]
    folders = [
        tiny_adapter(seed=1, target_modules=target_modules),
        tiny_adapter(seed=2, target_modules=target_modules, lora_alpha=3),
    ]
    weights = [0.7, -0.4]
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    embedding, head = base.model.embed_tokens.weight.clone(), base.lm_head.weight.clone()
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    model.load_adapter(folders[1], adapter_name="1")
    model.add_weighted_adapter(["0", "1"], weights, "both", combination_type="cat")
    architecture = architecture_of(AutoConfig.from_pretrained(tiny_model()))
    combined = combine_adapters([load_adapter(f, architecture) for f in folders], weights)
    inner = model.base_model.model
    for change, weight, layer in (
        (combined.embedding, embedding, inner.model.embed_tokens),
        (combined.head, head, inner.lm_head),
    ):
        assert change is not None
        torch.testing.assert_close(
            change.merged(weight) - weight, layer.get_delta_weight("both"), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tokens", "rows or a matrix of its own for the embedding or the output layer"),
        ("whole", "has norms of its own: only plain LoRA"),
    ],
)
def test_what_is_no_sum_is_not_combined(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], kind: str, message: str
) -> None:
    architecture = architecture_of(AutoConfig.from_pretrained(tiny_model()))
    adapter = load_adapter(tiny_adapter(**KINDS[kind]), architecture)
    with pytest.raises(AdapterError, match=message):
        combine_adapters([adapter], [0.5])
