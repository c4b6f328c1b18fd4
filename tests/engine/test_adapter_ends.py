"""Adapters that change the embedding, the output layer or norms, against peft."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from nybble.engine import AdapterConfig, Request, SamplingParams
from nybble.engine.adapter_slots import AdapterSlots
from nybble.loaders import AdapterError, load_adapter, open_checkpoint
from nybble.quantizers import quantize_checkpoint

SOME = ["q_proj", "up_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": [*SOME, "lm_head"], "use_rslora": True},
    "head alone": {"target_modules": ["lm_head"], "lora_alpha": 20},
    "dora on the head": {"target_modules": ["v_proj", "lm_head"], "use_dora": True},
    "lora_bias on the head": {"target_modules": ["v_proj", "lm_head"], "lora_bias": True},
    "embedding": {"target_modules": [*SOME, "embed_tokens"], "rank_pattern": {"embed_tokens": 2}},
    "both": {"target_modules": [*SOME, "embed_tokens", "lm_head"]},
    "both, tied": {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": SOME, "trainable_token_indices": list(range(200, 20, -3))},
    "tokens of both": {
        "target_modules": SOME,
        "trainable_token_indices": {"embed_tokens": list(range(9, 99)), "lm_head": [7, 70, 17]},
    },
    "whole head": {"target_modules": SOME, "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": SOME, "modules_to_save": ["embed_tokens"]},
    "whole and tied": {
        "target_modules": SOME,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "norms": {"target_modules": SOME, "modules_to_save": ["input_layernorm", "model.norm"]},
    "all norms": {"target_modules": SOME, "modules_to_save": ["norm", "lm_head"]},
}


@pytest.mark.parametrize(
    ("format", "tied"),
    [
        ("nf4", False),
        pytest.param("bf16", True, marks=pytest.mark.slow),
        pytest.param("bf16", False, marks=pytest.mark.slow),
        pytest.param("nf4", True, marks=pytest.mark.slow),
    ],
)
def test_each_kind_says_what_peft_says_alone_and_in_company(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    format: str,
    tied: bool,
) -> None:
    """In two slots, so that each adapter is swapped in where another kind was."""
    base = tiny_model(tie_word_embeddings=tied)
    if format != "bf16":
        quantize_checkpoint(base, tmp_path / "q", format=format, group_size=32, progress=False)  # type: ignore[arg-type]
        base = tmp_path / "q"
    checkpoint = open_checkpoint(base)
    (plain,) = reference.greedy(reference.transformers_model(checkpoint), (11,), 8)
    expected, logprobs = {}, {}
    for kind in KINDS:
        model = PeftModel.from_pretrained(
            reference.transformers_model(checkpoint), tiny_adapter(tied=tied, **KINDS[kind])
        ).eval()
        (expected[kind],) = reference.greedy(model, (11,), 8)
        ids = torch.tensor([[*expected[kind].prompt, *expected[kind].tokens]])
        with torch.no_grad():
            found = torch.log_softmax(model(ids).logits[0], -1)
        logprobs[kind] = found[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert len({tuple(each.tokens) for each in expected.values()}) > len(KINDS) // 2
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=2, max_rank=4))

    async def said(kind: str | None, prompt: list[int]) -> tuple[list[int], list[float]]:
        params = SamplingParams(
            max_tokens=8, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
        )
        request = Request(f"{kind}", tuple(prompt), params, adapter=kind)
        tokens: list[int] = []
        found: list[float] = []
        async for output in engine.generate(request):
            if output.prompt_logprobs is not None:
                found += output.prompt_logprobs.logprobs.tolist()
            tokens += output.token_ids
            found += [each.logprob for each in output.logprobs]
        return tokens, found

    async def together() -> list[tuple[list[int], list[float]]]:
        each = (said(kind, expected[kind].prompt) for kind in KINDS)
        return await asyncio.gather(said(None, plain.prompt), *each)

    try:
        for kind in KINDS:
            engine.load_adapter(kind, str(tiny_adapter(tied=tied, **KINDS[kind])))
            alone = reference.alone(engine, expected[kind].prompt, 8, adapter=kind)
            assert alone == expected[kind].tokens, kind
        (base_tokens, _), *others = asyncio.run(together())
        assert base_tokens == plain.tokens
        for kind, (tokens, found) in zip(KINDS, others, strict=True):
            assert tokens == expected[kind].tokens, kind
            torch.testing.assert_close(
                torch.tensor(found), logprobs[kind], atol=1e-3, rtol=0, msg=lambda m, k=kind: k + m
            )
    finally:
        engine.stop()


def test_in_16_bits_each_kind_says_in_company_what_it_says_alone_to_the_last_bit(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """With the compiled kernels, which compute bfloat16."""
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="gptq", group_size=32, progress=False)
    kinds = [kind for kind in KINDS if "tied" not in kind]
    engine = reference.start(
        open_checkpoint(tmp_path / "q"),
        dtype=torch.bfloat16,
        max_num_seqs=2 * len(kinds),
        adapters=AdapterConfig(slots=len(kinds), max_rank=4),
    )

    async def said(name: str, kind: str | None, length: int) -> list[tuple[int, float]]:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)
        request = Request(name, tuple(range(5, 5 + length)), params, adapter=kind)
        found = [output async for output in engine.generate(request)]
        return [(output.token_ids[0], output.logprobs[0].logprob) for output in found]

    async def together() -> list[list[tuple[int, float]]]:
        each = [(None, 9), *((kind, length) for length in (9, 14) for kind in kinds)]
        return await asyncio.gather(*(said(f"{n}", *one) for n, one in enumerate(each)))

    try:
        for kind in kinds:
            engine.load_adapter(kind, str(tiny_adapter(**KINDS[kind])))
        found = asyncio.run(together())
        alone = [(None, 9), *((kind, length) for length in (9, 14) for kind in kinds)]
        for one, expected in zip(alone, found, strict=True):
            assert asyncio.run(said("alone", *one)) == expected, one
    finally:
        engine.stop()


def test_an_embedding_of_a_prompt_is_that_of_the_adapters_norm(
    reference: Any, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    checkpoint, folder = open_checkpoint(tiny_model()), tiny_adapter(**KINDS["all norms"])
    model = PeftModel.from_pretrained(reference.transformers_model(checkpoint), folder).eval()
    prompt = tuple(range(20, 60))
    with torch.no_grad():
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=1, max_rank=4))
    try:
        engine.load_adapter("norms", str(folder))
        for pooling, expected in (("last", states[-1]), ("mean", states.mean(0))):
            request = Request(pooling, prompt, SamplingParams(), adapter="norms", pooling=pooling)

            async def embedding(request: Request = request) -> Any:
                return [output async for output in engine.generate(request)][-1].embedding

            found = torch.tensor(asyncio.run(embedding()))
            torch.testing.assert_close(
                found, torch.nn.functional.normalize(expected, dim=0), atol=1e-4, rtol=0
            )
    finally:
        engine.stop()


def test_ends_are_counted_and_the_matrix_that_the_base_has_is_not_kept(
    reference: Any, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    def load(kind: str) -> int:
        return int(engine.load_adapter(kind, str(tiny_adapter(**KINDS[kind]))).nbytes)

    vocab, hidden, rank, number = 320, 128, 4, 4
    engine = reference.start(
        open_checkpoint(tiny_model()), adapters=AdapterConfig(slots=1, max_rank=4)
    )
    try:
        # PEFT saves the whole output layer beside the LoRA on it.
        assert load("head alone") == number * rank * (vocab + hidden)
        assert load("whole head") > number * vocab * hidden
        # Training has changed the rows of the tokens it saw, 48 at most.
        assert load("whole embedding") < number * 48 * hidden + load("norms")
    finally:
        engine.stop()


def test_a_slot_does_not_outlive_the_host_copy_that_it_refers_to(
    reference: Any, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    """Whole matrices are in host memory alone, whose limit holds though there are free slots."""
    folders = [tiny_adapter(seed=seed, **KINDS["whole head"]) for seed in range(3)]
    one = 320 * 128 * 4 + 46_000
    engine = reference.start(
        open_checkpoint(tiny_model()),
        adapters=AdapterConfig(slots=4, max_rank=4, host_bytes=2 * one),
    )
    try:
        expected = []
        for index, folder in enumerate(folders):
            engine.load_adapter(f"{index}", str(folder))
            expected.append(reference.alone(engine, range(3, 20), 6, adapter=f"{index}"))
            held = [info for info in engine.adapters() if info.residency != "disk"]
            assert sum(info.nbytes for info in held) <= 2 * one
        assert [info.residency for info in engine.adapters()] == ["disk", "device", "device"]
        for index in range(3):
            assert reference.alone(engine, range(3, 20), 6, adapter=f"{index}") == expected[index]
    finally:
        engine.stop()


def test_a_gpu_and_several_ranks_refuse_them_by_name(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    architecture = open_checkpoint(tiny_model()).architecture
    slots = AdapterSlots(
        architecture, count=1, max_rank=4, device=torch.device("cpu"), dtype=torch.float32
    )
    slots.device = torch.device("cuda")
    adapter = load_adapter(tiny_adapter(**KINDS["norms"]), architecture)
    with pytest.raises(AdapterError, match="has changes of embeddings, the output layer or norms"):
        slots.stage(adapter)
