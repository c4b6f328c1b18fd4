"""The one command that measures on a GPU has run every line it can before it meets one."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

ROOT = Path(__file__).parents[2]


def test_the_matmul_benchmark_runs_through_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "kernels/bench/gpu_matmul.py", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert (tmp_path / "gpu_matmul.json").exists()


def test_the_step_benchmark_runs_through_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "kernels/bench/gpu_step.py", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert (tmp_path / "gpu_step.json").exists()
