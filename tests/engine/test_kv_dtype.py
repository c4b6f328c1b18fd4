"""Keys and values in 8 bits take half the memory and change the logits little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from nybble.engine import Engine, EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.request import Request, SamplingParams
from nybble.engine.runner import ModelRunner
from nybble.engine.scheduler import ScheduledSequence
from nybble.engine.sequence import BlockTable, Sequence
from nybble.loaders import Checkpoint
from nybble.models import architecture_of
from tests.reference import alone, start, together

CONFIG = EngineConfig(dtype=torch.float32, block_size=4, max_num_seqs=2, max_batched_tokens=32)


def logits(checkpoint: object, config: EngineConfig) -> Tensor:
    """After a prompt in two chunks, and a decode step."""
    decoder = Decoder(
        architecture_of(checkpoint.config),  # type: ignore[attr-defined]
        checkpoint.weights(),  # type: ignore[attr-defined]
        device=torch.device("cpu"),
        dtype=config.dtype,
        max_model_len=64,
    )
    layout = KVCacheLayout.of(decoder.architecture, config, 64)
    runner = ModelRunner(decoder, config, layout, 16)
    prompt = tuple(range(40, 70))
    one = Sequence(Request("r", prompt, SamplingParams()), 1, None, None)  # type: ignore[arg-type]
    one.block_tables = (BlockTable([7, 2, 9, 4, 1, 15, 3, 8]),)
    found = []
    with torch.inference_mode():
        for count in (20, 9, 1):
            found.append(runner.run([ScheduledSequence.of(one, count)]).clone())
            one.num_computed_tokens += count
    return torch.cat(found)


both = pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])


@both
def test_8_bits_change_the_logits_little(
    plain_checkpoint: Callable[..., object], kv_dtype: Literal["int8", "fp8"]
) -> None:
    exact = logits(plain_checkpoint(), CONFIG)
    found = logits(plain_checkpoint(), replace(CONFIG, kv_dtype=kv_dtype))
    error = (found - exact).norm() / exact.norm()
    assert 0 < error < {"int8": 0.02, "fp8": 0.06}[kv_dtype]


@both
def test_8_bits_take_half_the_memory_of_16(
    plain_checkpoint: Callable[..., object], kv_dtype: Literal["int8", "fp8"]
) -> None:
    architecture = architecture_of(plain_checkpoint().config)  # type: ignore[attr-defined]
    half = replace(CONFIG, dtype=torch.bfloat16)
    eighth = replace(half, kv_dtype=kv_dtype)
    sizes = [KVCacheLayout.of(architecture, each, 64).block_bytes for each in (eighth, half)]
    share = sizes[0] / sizes[1]
    head_dim = architecture.attentions[0].head_dim
    assert share == (head_dim + 4) / (2 * head_dim)


def test_fp8_is_refused_on_the_cpu(plain_checkpoint: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="kv_dtype is 'fp8', which needs a GPU"):
        Engine.load(plain_checkpoint(), replace(CONFIG, kv_dtype="fp8"))  # type: ignore[arg-type]


def test_int8_on_the_cpu_answers_alike_alone_and_in_company(
    plain_checkpoint: Callable[..., Checkpoint],
) -> None:
    """With prompts of several chunks, in steps that mix them with decoding."""
    engine = start(plain_checkpoint(), dtype=torch.bfloat16, kv_dtype="int8")
    prompts = [range(40, 40 + length) for length in (3, 17, 70)]
    try:
        assert together(engine, prompts, 12) == [alone(engine, ids, 12) for ids in prompts]
    finally:
        engine.stop()
