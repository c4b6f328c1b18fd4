"""`make gpu` as it runs on a GPU: every section, with the widths it measures, up to the numbers.

Its dry run goes through other branches: on the CPU, without graphs, events, or 80 GiB to fill. Here
memory holds no numbers, so that only what compares them may not hold.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.kernels.bench import gpu_decode, gpu_matmul
from nybble.kernels.bench.gpu_section import LLAMA_2_13B, Section

from .device import CUDA, Device

# Two layers launch what forty do, and one shape goes where the others go.
FEWER: dict[str, tuple[Any, str, Any]] = {
    "decode": (gpu_decode, "LLAMA_2_13B", LLAMA_2_13B | {"num_hidden_layers": 2}),
    "matmul": (gpu_matmul, "SHAPES", gpu_matmul.SHAPES[:1]),
}


@pytest.mark.parametrize(
    "name",
    [
        "decode",
        "lora",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("checks", "matmul", "attention", "step")
        ),
    ],
)
def test_a_section_runs_to_its_end_in_the_memory_of_an_h100(
    gpu: Device,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu.total, gpu.has_numbers = 78 << 30, False
    if name in FEWER:
        monkeypatch.setattr(*FEWER[name])
    section = Section(name, CUDA, dry=False, deadline=time.monotonic() + 3600, out=tmp_path)
    with torch.inference_mode():
        importlib.import_module(f"nybble.kernels.bench.gpu_{name}").run(section)
    printed = capsys.readouterr().out
    assert "FAILED" not in printed  # an exception
    assert "out of time" not in printed
    assert gpu.launched
    if name != "checks":
        assert gpu.replays > 0
        assert json.loads((tmp_path / f"{name}.json").read_text())
