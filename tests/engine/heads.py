"""Of the tests of heads that draft (EAGLE-3 and MTP): prompts, answers, and what was drafted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nybble.engine import Engine, Request, SamplingParams
from nybble.engine.drafter import Draft
from nybble.engine.head_drafter import HeadDrafter


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 250, (length,), generator=generator).tolist())


async def complete(
    engine: Engine,
    name: str,
    ids: tuple[int, ...],
    adapter: str | None = None,
    guide: Any = None,
    **params: Any,
) -> list[int]:
    params = {"temperature": 0, "max_tokens": 40, "ignore_eos": True} | params
    request = Request(name, ids, SamplingParams(**params), adapter=adapter, guide=guide)
    return [token async for out in engine.generate(request) for token in out.token_ids]


def drafter_of(engine: Engine) -> HeadDrafter:
    speculation = engine._thread._scheduler.speculation
    assert speculation is not None
    assert isinstance(speculation._drafter, HeadDrafter)
    return speculation._drafter


def recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], Draft]]:
    """All drafts of an engine from now on, each behind the tokens that it follows."""
    drafts: list[tuple[list[int], Draft]] = []
    drafter = drafter_of(engine)
    draft = drafter.draft

    def recording(limits: Any, worth: Any) -> Any:
        found = draft(limits, worth)
        drafts.extend((list(sequence.token_ids), each) for sequence, each in found.items())
        return found

    monkeypatch.setattr(drafter, "draft", recording)
    return drafts
