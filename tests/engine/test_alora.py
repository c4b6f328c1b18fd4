"""Adapters that an invocation activates (aLoRA, Greenewald et al. 2025), against peft."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from nybble.engine import AdapterConfig, AdapterMixture, ParameterError, Request, SamplingParams
from nybble.loaders import AdapterError, load_adapter, open_checkpoint
from nybble.quantizers import merge_adapter

INVOCATION = [41, 42, 43]
OPTIONS: dict[str, Any] = {
    "alora_invocation_tokens": INVOCATION,
    "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"],
    "lora_alpha": 16,
}
BEFORE, AFTER = list(range(60, 100)), list(range(100, 107))
PROMPTS = {
    "once": [*BEFORE, *INVOCATION, *AFTER],
    "the last counts": [*BEFORE[:9], *INVOCATION, *AFTER, *INVOCATION, 7],
    "at the end": [*BEFORE, *INVOCATION],
    "at the beginning": [*INVOCATION, *AFTER],
    "never": [*BEFORE, 41, 42, *AFTER],
}


@pytest.fixture
def engine(
    reference: Any, tiny_model: Callable[..., Path], folder: Path, tiny_adapter: Callable[..., Path]
) -> Any:
    """Steps are shorter than most prompts, and blocks shorter than what is before an invocation."""
    engine = reference.start(
        open_checkpoint(tiny_model()),
        adapters=AdapterConfig(slots=2, max_rank=4),
        block_size=4,
        max_batched_tokens=24,
    )
    engine.load_adapter("alora", str(folder))
    engine.load_adapter("lora", str(tiny_adapter()))
    yield engine
    engine.stop()


@pytest.fixture
def folder(tiny_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """With weights of its own: the text of the training has no invocation."""
    folder = Path(shutil.copytree(tiny_adapter(**OPTIONS), tmp_path / "alora"))
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


async def said(
    engine: Any, name: str, prompt: list[int], adapter: str | None
) -> tuple[list[int], list[float], int]:
    """Greedy tokens, log probabilities of them, and how many of the prompt were cached."""
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
    request = Request(name, tuple(prompt), params, adapter=adapter)
    outputs = [output async for output in engine.generate(request)]
    return (
        [token for output in outputs for token in output.token_ids],
        [each.logprob for output in outputs for each in output.logprobs],
        max(output.cached_tokens or 0 for output in outputs),
    )


def test_it_says_what_peft_says_alone_and_in_company(
    reference: Any, tiny_model: Callable[..., Path], folder: Path, engine: Any
) -> None:
    model = PeftModel.from_pretrained(
        reference.transformers_model(open_checkpoint(tiny_model())), folder
    ).eval()
    expected = {}
    for name, prompt in PROMPTS.items():
        ids = torch.tensor([prompt])
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            min_new_tokens=8,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = answer.sequences[0, len(prompt) :]
        logprobs = torch.log_softmax(torch.cat(answer.logits), -1).gather(1, tokens[:, None])
        expected[name] = tokens.tolist(), logprobs[:, 0]

    async def together() -> list[Any]:
        each = [(name, prompt, "alora") for name, prompt in PROMPTS.items()]
        each += [("base", PROMPTS["once"], None), ("lora", PROMPTS["once"], "lora")]  # type: ignore[list-item]
        return await asyncio.gather(*(said(engine, *one) for one in each))

    lora = asyncio.run(said(engine, "lora", PROMPTS["once"], "lora"))[:2]
    base = asyncio.run(said(engine, "base", PROMPTS["once"], None))[:2]
    never = asyncio.run(said(engine, "base", PROMPTS["never"], None))[:2]
    *found, base_found, lora_found = asyncio.run(together())
    for (name, (tokens, logprobs)), (mine, own, _) in zip(expected.items(), found, strict=True):
        assert mine == tokens, name
        torch.testing.assert_close(torch.tensor(own), logprobs, atol=1e-3, rtol=0)
    assert base_found[0] == base[0] != expected["once"][0]
    assert lora_found[0] == lora[0] != base[0]
    assert expected["never"][0] == never[0]


def test_what_the_base_computed_before_the_invocation_is_used_again(engine: Any) -> None:
    """And what the adapter computed after it by requests of the adapter alone."""
    prompt = PROMPTS["once"]
    cached = [
        asyncio.run(said(engine, "one", prompt, adapter))[2]
        for adapter in (None, "alora", "alora", None, "lora")
    ]
    assert cached == [0, 40, 48, 48, 0]
    found = [asyncio.run(said(engine, "one", prompt, "alora"))[0] for _ in range(2)]
    assert found[0] == found[1]


def test_another_invocation_of_the_same_text_is_no_hit_behind_it(engine: Any) -> None:
    """The adapter may be active in one prompt where it is not yet in another."""
    longer = [*PROMPTS["once"], *INVOCATION, 9]
    alone = asyncio.run(said(engine, "one", longer, "alora"))
    assert alone[2] == 0
    asyncio.run(said(engine, "one", PROMPTS["once"], "alora"))
    again = asyncio.run(said(engine, "one", longer, "alora"))
    assert again[0] == alone[0]


def test_it_is_not_merged_or_mixed(
    engine: Any, folder: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ParameterError, match="'alora' is an aLoRA, which is active in a part"):
        asyncio.run(said(engine, "one", [1, 2], AdapterMixture({"alora": 1})))
    adapter = load_adapter(folder, open_checkpoint(tiny_model()).architecture)
    with pytest.raises(AdapterError, match=r"is an aLoRA, .* it cannot be merged"):
        merge_adapter(tiny_model(), adapter, tmp_path / "merged", progress=False)
    plain = replace(adapter, invocation=())
    merge_adapter(tiny_model(), plain, tmp_path / "merged", progress=False)
