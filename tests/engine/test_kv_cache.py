"""Layers in groups by their windows: who shares blocks with whom, and what that saves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from nybble.engine import Engine, EngineConfig, Request, SamplingParams
from nybble.engine.decoder import Decoder
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.runner import ModelRunner
from nybble.engine.scheduler import ScheduledSequence
from nybble.engine.sequence import BlockTable, Sequence
from nybble.models import architecture_of

WINDOW, BLOCK = 24, 4
CONFIG = EngineConfig(
    dtype=torch.float32, block_size=BLOCK, max_num_seqs=4, max_batched_tokens=16, max_model_len=512
)
# Layers that see everything, and layers with a window of Gemma 3's sizes.
GEMMA_3 = {"270m": (3, 15), "1b": (4, 22), "4b": (5, 29), "12b": (8, 40), "27b": (10, 52)}


def gemma3(size: str, **settings: Any) -> PretrainedConfig:
    """Gemma 3's config: every sixth layer sees everything."""
    return AutoConfig.for_model(
        "gemma3_text",
        num_hidden_layers=sum(GEMMA_3[size]),
        sliding_window=512 if size in ("270m", "1b") else 1024,
        max_position_embeddings=131072,
        **settings,
    )


@pytest.mark.parametrize("size", GEMMA_3)
def test_gemma_3_keeps_less_than_a_quarter_of_the_bytes_of_one_group(size: str) -> None:
    architecture = architecture_of(gemma3(size))
    config = EngineConfig()
    layout = KVCacheLayout.of(architecture, config, 32_768)
    of_each_layer = [layout.groups[group].window for group in layout.group_of_layer]
    assert of_each_layer == list(architecture.windows)
    assert of_each_layer.count(0) == GEMMA_3[size][0]
    attention = architecture.attentions[0]
    whole = 2 * attention.kv_heads * attention.head_dim * 2 * len(architecture.layers) * 32_768
    assert 0.15 * whole < layout.sequence_bytes(32_768) < 0.25 * whole


def test_layers_of_different_groups_at_the_same_place_use_the_same_memory() -> None:
    layout = KVCacheLayout.of(architecture_of(gemma3("27b")), EngineConfig(), 32_768)
    for group in layout.groups:
        places = [layout.place_in_block[layer] for layer in group.layers]
        assert places == list(range(len(places)))
    entries = max(len(group.layers) for group in layout.groups) * 2 * 4 * 256
    assert layout.block_bytes == entries * EngineConfig().block_size * 2


@pytest.mark.parametrize("length", [512, 1024])
def test_windows_that_no_sequence_outgrows_make_no_groups(length: int) -> None:
    layout = KVCacheLayout.of(architecture_of(gemma3("27b")), EngineConfig(), length)
    assert [group.window for group in layout.groups] == [0]


def test_one_layer_without_a_window_among_many_costs_no_more_than_sixteen_groups() -> None:
    config = AutoConfig.for_model(
        "qwen2",
        num_hidden_layers=48,
        use_sliding_window=True,
        sliding_window=128,
        max_window_layers=1,
    )
    layout = KVCacheLayout.of(architecture_of(config), EngineConfig(), 32_768)
    assert 2 <= len(layout.groups) <= 16


def test_layers_of_different_shapes_are_one_group() -> None:
    architecture = architecture_of(gemma3("270m"))
    first, *others = architecture.layers
    wider = replace(first, mixers=(replace(architecture.attentions[0], head_dim=512),))
    layout = KVCacheLayout.of(
        replace(architecture, layers=(wider, *others)), EngineConfig(), 32_768
    )
    assert len(layout.groups) == 1
    narrow = KVCacheLayout.of(
        replace(architecture, layers=tuple(others)), EngineConfig(), 512
    ).block_bytes
    attention = architecture.attentions[0]
    assert layout.block_bytes == narrow + 2 * attention.kv_heads * 512 * 2 * 16


@pytest.mark.parametrize("tokens", [1, 16, 17, 500, 5_000, 32_768])
def test_a_longest_sequence_is_the_longest_that_fits(tokens: int) -> None:
    layout = KVCacheLayout.of(architecture_of(gemma3("270m")), EngineConfig(), 32_768)
    blocks = layout.sequence_blocks(tokens)
    found = layout.longest_sequence(blocks, 32_768)
    assert found >= tokens
    assert layout.sequence_blocks(found) <= blocks
    assert found == 32_768 or layout.sequence_blocks(found + 1) > blocks


def test_a_cache_below_one_block_of_each_group_is_refused() -> None:
    layout = KVCacheLayout.of(architecture_of(gemma3("270m")), EngineConfig(), 32_768)
    least = len(layout.groups) * layout.block_bytes
    assert layout.blocks_in(least) == len(layout.groups)
    with pytest.raises(ValueError, match=f"holds no block of 16 tokens, which takes {least} bytes"):
        layout.blocks_in(least - 1)


@pytest.fixture(scope="module")
def mixed(plain_checkpoint: Callable[..., Any]) -> Any:
    """A layer that sees everything, and two with a window."""
    return plain_checkpoint(layers=3, sliding_window=WINDOW, full_layers=1)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 200, (length,), generator=generator).tolist())


def started(checkpoint: Any, sequences: int, tokens: int, spare: int = 0) -> Engine:
    """An engine whose cache holds just so many sequences of so many tokens, and spare blocks."""
    layout = KVCacheLayout.of(architecture_of(checkpoint.config), CONFIG, 512)
    assert sorted(layout.windows) == [0, WINDOW, WINDOW]
    nbytes = sequences * layout.sequence_bytes(tokens) + spare * layout.block_bytes
    engine = Engine.load(checkpoint, replace(CONFIG, kv_cache_bytes=nbytes), progress=False)
    engine.start()
    return engine


async def generate(engine: Engine, prompts: list[tuple[int, ...]], count: int) -> list[list[int]]:
    """Greedy tokens of prompts that run at the same time."""
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)

    async def one(ids: tuple[int, ...]) -> list[int]:
        outputs = engine.generate(Request(str(hash(ids)), ids, params))
        return [token async for output in outputs for token in output.token_ids]

    return list(await asyncio.gather(*(one(ids) for ids in prompts)))


def expected(checkpoint: Any, ids: tuple[int, ...], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    return model.generate(  # type: ignore[no-any-return]
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :].tolist()


def test_a_long_context_fits_where_one_group_would_not_and_gives_the_tokens_of_transformers(
    mixed: Any,
) -> None:
    ids = prompt(0, 300)
    wanted = expected(mixed, ids, 60)
    # The windows of the prompt's end are taken back while the output comes: a few spare blocks keep
    # them findable.
    engine = started(mixed, 1, 360, spare=40)
    try:
        blocks = engine.stats().kv_blocks_total
        assert blocks < 3 * 90, "three groups of all the tokens"
        for _ in range(2):  # the second time around with a prefix cache
            assert asyncio.run(generate(engine, [ids], 60)) == [wanted]
        assert engine.stats().prefix_hit_tokens >= 280
        assert engine.stats().kv_blocks_free == blocks
    finally:
        engine.stop()


def test_sequences_that_preempt_each_other_give_the_tokens_of_transformers(mixed: Any) -> None:
    prompts = [prompt(seed, 40) for seed in range(4)]
    wanted = [expected(mixed, ids, 100) for ids in prompts]
    engine = started(mixed, 2, 140)
    try:
        assert asyncio.run(generate(engine, prompts, 100)) == wanted
        assert engine.stats().preemptions > 0
        assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total
    finally:
        engine.stop()


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_groups_give_the_logits_of_one_group_in_every_kind_of_cache(
    mixed: Any, kv_dtype: Literal["auto", "int8", "fp8"]
) -> None:
    config = replace(CONFIG, kv_dtype=kv_dtype)
    architecture = architecture_of(mixed.config)
    decoder = Decoder(
        architecture,
        mixed.weights(),
        device=torch.device("cpu"),
        dtype=config.dtype,
        max_model_len=64,
    )
    tables = [[7, 2, 9, 4, 1, 15, 3, 8, 20], [5, 6, 0, 10, 11, 12, 13, 14, 21]]
    tables.append([16, 17, 18, 19, 22, 23, 24, 25, 26])

    def logits(groups: int) -> Tensor:
        # What fits the window makes one group, what does not makes several.
        layout = KVCacheLayout.of(architecture, config, 512 if groups > 1 else WINDOW)
        assert len(layout.groups) == groups
        runner = ModelRunner(decoder, config, layout, 27)
        one = Sequence(Request("r", prompt(3, 33), SamplingParams()), 1, None, None)  # type: ignore[arg-type]
        one.block_tables = tuple(BlockTable(list(table)) for table in tables[:groups])
        found = []
        with torch.inference_mode():
            for count in (16, 16, 1):
                runner.run([ScheduledSequence.of(one, count)])
                one.num_computed_tokens += count
                one.token_ids.append(5)
            found.append(runner.run([ScheduledSequence.of(one, 1)]).clone())
        return torch.cat(found)

    assert torch.equal(logits(3), logits(1))
