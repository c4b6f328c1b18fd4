"""The one command that measures on a GPU has run every line it can before it meets one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "kernels/bench/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param(sections, marks=pytest.mark.slow)
        for sections in (
            ["step"],  # all but "ranks" run on the emulated GPU
            ["checks", "decode", "matmul", "attention", "lora", "ranks"],
        )
    ],
    ids=",".join,
)
def test_sections_run_through_the_interpreter_and_leave_their_results(
    tmp_path: Path, sections: list[str]
) -> None:
    options = ("--dry-run", "--minutes", "30", "--out", str(tmp_path))
    done = run("--only", ",".join(sections), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == set(sections)
    assert all(result["failed"] == [] for result in found.values())
    if "decode" in sections:
        assert {row["graphs"] for row in found["decode"]["decode"]} == {True, False}


@pytest.mark.slow
def test_a_section_that_fails_is_named_and_the_next_one_runs() -> None:
    done = run("--only", "lora,step")  # without --dry-run they need a GPU
    assert done.returncode == 1
    assert "lora: FAILED with exit code 2" in done.stdout
    assert "step: FAILED with exit code 2" in done.stdout
