"""What the machine code of the kernels of layers with states must look like, on an absent GPU."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")


@pytest.fixture(
    scope="module",
    params=[["--quick"], pytest.param([], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def table(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """One row per compiled kernel; the compiler needs a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    module = "nybble.kernels.bench.recurrent_report"
    command = [sys.executable, "-m", module, *request.param, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_they_compile_for_ampere_and_hopper(table: list[dict[str, Any]]) -> None:
    assert {80, 90} <= {entry["case"]["capability"] for entry in table}


def test_no_register_is_spilled_but_by_the_delta_rule_in_chunks(
    table: list[dict[str, Any]],
) -> None:
    others = [e for e in table if e["case"]["kernel"] != "by chunks"]
    assert {"by rows", "scan by rows", "scan by chunks"} <= {e["case"]["kernel"] for e in others}
    assert [e for e in others if e["row"]["local"]] == []


def test_the_products_of_chunks_run_on_tensor_cores(table: list[dict[str, Any]]) -> None:
    chunks = [entry["row"] for entry in table if "by chunks" in entry["case"]["kernel"]]
    assert min(row["tensor_core"] for row in chunks) >= 8


def test_shared_memory_fits_every_device(table: list[dict[str, Any]]) -> None:
    assert max(entry["row"]["shared"] for entry in table) <= 99 << 10
