"""Host memory for adapters on the CPU, where running requests hold what they use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.engine import AdapterConfig, Request, SamplingParams
from nybble.loaders import open_checkpoint

PROMPT = tuple(range(3, 12))


@pytest.mark.parametrize(
    "tenants",
    [
        pytest.param(("a", "b", "c"), id="three"),
        pytest.param(("", "", ""), id="one", marks=pytest.mark.slow),
    ],
)
def test_running_adapters_do_not_hold_it_for_ever(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tenants: tuple[str, str, str],
) -> None:
    """Two adapters fit, and both are always in use. A third and a fourth have their turns."""
    kinds = [{"r": 2, "seed": seed} for seed in range(4)]
    checkpoint = open_checkpoint(tiny_model())
    expected, most = {}, 0
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=4, max_rank=2))
    try:
        for number, kind in enumerate(kinds):
            info = engine.load_adapter(f"{number}", str(tiny_adapter(**kind)))
            most = max(most, info.nbytes)
            expected[f"{number}"] = reference.alone(engine, PROMPT, 16, adapter=f"{number}")
    finally:
        engine.stop()
    engine = reference.start(
        checkpoint, adapters=AdapterConfig(slots=4, max_rank=2, host_bytes=2 * most)
    )
    for number, kind in enumerate(kinds):
        engine.load_adapter(f"{number}", str(tiny_adapter(**kind)))
    answered = 0
    done = asyncio.Event()

    async def said(name: str, adapter: str, tenant: str, count: int = 16) -> list[int]:
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        request = Request(name, PROMPT, params, adapter=adapter, tenant=tenant)
        return [token async for output in engine.generate(request) for token in output.token_ids]

    async def client(number: int) -> None:
        nonlocal answered
        # Of different lengths, so that they do not all end in the same step.
        adapter, turn, count = "01"[number % 2], 0, 6 + 2 * number
        while not done.is_set():
            found = await said(f"{number}/{turn}", adapter, tenants[number % 2], count)
            assert found == expected[adapter][:count]
            answered, turn = answered + 1, turn + 1
            if answered > 400:
                done.set()

    async def traffic() -> None:
        clients = [asyncio.create_task(client(number)) for number in range(6)]
        while answered < 6:
            await asyncio.sleep(0)
        late = [said(name, name, tenants[2]) for name in "23"]
        assert await asyncio.gather(*late) == [expected["2"], expected["3"]]
        assert answered <= 100  # without keeping memory for them it was 169 and more
        done.set()
        await asyncio.gather(*clients)

    try:
        asyncio.run(traffic())
        assert sum(info.residency != "disk" for info in engine.adapters()) <= 2
    finally:
        engine.stop()
