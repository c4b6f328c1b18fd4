"""An MTP head on a GPU: nothing compiled on the way, and graphs capture what steps do."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nybble.engine import Engine
from nybble.loaders import open_checkpoint
from nybble.quantizers import InFlight
from nybble.quantizers.drafts import prepared_draft

from .device import DEVICE, Device
from .test_serving import GPU, _tokens, request


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_5_text"])
def test_drafts_change_no_answer_and_compile_nothing(
    gpu: Device, tiny_mtp: ModuleType, tmp_path: Path, family: str
) -> None:
    """Graphs compute the first steps, without drafts. States go back to before a wrong draft."""
    folder = tmp_path / family
    tiny_mtp.write_tiny_mtp(folder, family)
    config = replace(GPU, adapters=None, max_draft_tokens=2)
    answers = []
    for speculate in ("off", "mtp"):
        drafting = replace(config, speculate=speculate)
        draft = prepared_draft(
            str(folder), drafting, device=torch.device("cpu"), model_quantize="nf4", progress=False
        )
        model = InFlight(open_checkpoint(folder), layers="nf4")
        engine = Engine.load(model, drafting, progress=False, draft=draft)
        DEVICE.computes = False
        engine.warm_up(progress=False)
        DEVICE.computes = True
        warm = set(gpu.launched)
        engine.start()
        try:
            answers.append(_answer(engine))
            assert set(gpu.launched) - warm == set()
            if speculate == "mtp":
                assert engine.stats().draft_tokens > 3
        finally:
            engine.stop()
    assert answers[0] == answers[1]


def _answer(engine: Engine) -> list[int]:
    return asyncio.run(_tokens(engine, request("r", 40, 37, max_tokens=8)))
