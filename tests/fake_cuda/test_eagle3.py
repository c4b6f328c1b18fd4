"""An EAGLE-3 head on a GPU: nothing compiled on the way, and graphs capture what steps do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nybble.engine import Engine
from nybble.engine.head_drafter import HeadDrafter
from nybble.loaders import open_checkpoint

from .device import DEVICE, Device
from .test_serving import GPU, _tokens, request, running

CONFIG = replace(GPU, deterministic=True, adapters=None)


@contextmanager
def drafting(checkpoint: Path, head: Path, **settings: Any) -> Any:
    engine = Engine.load(
        open_checkpoint(checkpoint),
        replace(CONFIG, **settings),
        progress=False,
        draft=open_checkpoint(head),
    )
    DEVICE.computes = False
    engine.warm_up(progress=False)
    DEVICE.computes = True
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def answer(engine: Engine) -> list[int]:
    return asyncio.run(_tokens(engine, request("r", 40, 37, max_tokens=8)))


@pytest.mark.slow
def test_drafts_change_no_answer_and_compile_nothing(
    gpu: Device,
    checkpoint: Path,
    tiny_eagle3: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Graphs compute the first steps, without drafts, or steps part by part do."""
    head = tiny_eagle3(tmp_path / "head", checkpoint, captured=(0, 1))
    with running(checkpoint, CONFIG) as engine:
        expected = answer(engine)
    drafts: list[list[Any]] = []
    for graphs in (True, False):
        with drafting(checkpoint, head, speculate="draft", max_draft_tokens=3) as engine:
            speculation = engine._thread._scheduler.speculation
            assert speculation is not None
            drafter = speculation._drafter
            assert isinstance(drafter, HeadDrafter)
            if not graphs:
                engine._runner._graphs = engine._runner._mixed = None
            draft, found = drafter.draft, []

            def late(limits: Any, worth: Any, draft: Any = draft, found: list[Any] = found) -> Any:
                late = {each: n for each, n in limits.items() if each.num_output_tokens > 3}
                made = draft(late, worth)
                found += [each.tokens for each in made.values()]
                return made

            monkeypatch.setattr(drafter, "draft", late)
            warm, replays = set(gpu.launched), gpu.replays
            assert answer(engine) == expected
            assert (gpu.replays > replays) == graphs
            assert set(gpu.launched) - warm == set()
            drafts.append(found)
    assert drafts[0] == drafts[1]
    assert sum(map(len, drafts[0])) > 3
