"""``deterministic``: tokens and log probabilities are the same bit for bit alone and in company."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nybble.engine import Engine, Request, SamplingParams

from .device import Device
from .test_serving import GPU, request, running

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 2}
ONE_ORDER = replace(GPU, deterministic=True, max_batched_tokens=48)


def answers(engine: Engine, requests: list[Request]) -> list[Any]:
    """Token ids and log probabilities of each request, all asked at once."""

    async def one(request: Request) -> Any:
        outputs = [output async for output in engine.generate(request)]
        tokens = [token for output in outputs for token in output.token_ids]
        return tokens, [each for output in outputs for each in output.logprobs]

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*map(one, requests))

    return asyncio.run(all_at_once())


@pytest.fixture(scope="session")
def adapter(tiny_adapter: Callable[..., Path]) -> Path:
    return tiny_adapter(seed=0, layers_to_transform=[0])


def subjects() -> list[Request]:
    """A prompt of two chunks with an adapter, and a short one that is drawn."""
    long = request("long", 40, 55, adapter="a", logprobs=3, max_tokens=3)
    drawn = request("drawn", 60, 5, temperature=0.8, seed=3, logprobs=3, max_tokens=3)
    return [long, drawn]


def test_a_request_alone_is_what_it_is_in_company_and_in_other_chunks(
    gpu: Device, checkpoint: Path, adapter: Path
) -> None:
    with running(checkpoint, ONE_ORDER) as engine:
        warm = set(gpu.launched)
        engine.load_adapter("a", str(adapter))
        alone = [answers(engine, [each])[0] for each in subjects()]
        replays = gpu.replays
        assert replays > 0
        # The long prompt was read in chunks of 48 and 7 rows; its beginning is now cached, and the
        # rest is computed among others. How kernels round is compared in tests/kernels and in the
        # emulator; here, that the engine asks for those of one order and for no other.
        company = [request("x", 90, 17, logprobs=1), request("y", 120, 2, adapter="a")]
        again = [replace(each, request_id=each.request_id + "-again") for each in subjects()]
        crowded = answers(engine, [*company, *again])[2:]
        assert set(gpu.launched) - warm == set()
        names = {str(launch) for launch in gpu.launched}
    assert crowded == alone
    for kernel in ("fixed_order_kernel", "spans_kernel"):
        assert any(kernel in name for name in names)
    for kernel in ("few_rows_kernel", "prefill_kernel", "decode_kernel"):
        assert not any(kernel in name for name in names)


@pytest.mark.slow
def test_a_drafted_answer_is_the_same_bit_for_bit(gpu: Device, checkpoint: Path) -> None:
    # An answer of two tokens, which stand in the prompt in every order.
    bias = {7: 8.0, 8: 8.0}
    prompt = Request("r", (7, 7, 8, 8) * 4, SamplingParams(**GREEDY, logit_bias=bias))
    found = []
    for speculate in ("off", "ngram"):
        config = replace(ONE_ORDER, adapters=None, speculate=speculate)
        with running(checkpoint, config) as engine:
            found += answers(engine, [prompt])
            drafted = engine.stats().draft_tokens
    assert drafted > 0
    assert found[0] == found[1]
