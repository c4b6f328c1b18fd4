"""Fine-tuning and quantizing on a GPU: what they find is what the CPU finds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The package by its path, which is not left on sys.path: `kernels` here would answer probes.
START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from fake_cuda import guard
guard.load_guard()
from fake_cuda import training
sys.path.pop(0)
training.main()
"""


@pytest.mark.slow
def test_training_and_calibration_on_the_device_find_what_the_cpu_finds(
    checkpoint: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"item {index}"},
                {"role": "assistant", "content": "the dog barks"},
            ]
        }
        for index in range(12)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    source = tiny_model(family="qwen2", layers=1)
    arguments = map(str, (Path(__file__).parents[1], checkpoint, source, data, tmp_path))
    command = [sys.executable, "-c", START, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    on_cpu, on_gpu = json.loads(done.stdout).values()
    assert on_gpu["gptq"][:3] == pytest.approx(on_cpu["gptq"][:3], rel=1e-4)  # q, k and v
    # What follows has been through 16-bit operations that round in other places.
    assert on_gpu["gptq"] == pytest.approx(on_cpu["gptq"], rel=0.05)
    assert on_gpu["awq"] == pytest.approx(on_cpu["awq"], rel=0.05)
    assert on_gpu["losses"] == pytest.approx(on_cpu["losses"], rel=5e-3)
    assert on_cpu["losses"][-1] < on_cpu["losses"][0]
