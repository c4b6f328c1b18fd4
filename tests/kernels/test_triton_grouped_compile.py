"""What the machine code of the experts' matmul must look like, on an absent GPU."""

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
    module = "nybble.kernels.bench.grouped_report"
    command = [sys.executable, "-m", module, *request.param, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_compiles_from_ampere_to_blackwell(table: list[dict[str, Any]]) -> None:
    assert {80, 90, 120} <= {entry["case"]["capability"] for entry in table}


def test_no_register_is_spilled(table: list[dict[str, Any]]) -> None:
    assert [e for e in table if e["row"]["spill"] or e["row"]["local"]] == []


def test_shared_memory_fits_the_device(table: list[dict[str, Any]]) -> None:
    limit = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB, CUDA programming guide
    for entry in table:
        assert entry["row"]["shared"] <= limit[entry["case"]["capability"]] << 10


def test_products_run_on_tensor_cores(table: list[dict[str, Any]]) -> None:
    for entry in table:
        # A step of 16-bit weights has half as many columns.
        assert entry["row"]["tensor_core"] >= (8 if entry["case"]["group"] else 4), entry


def test_hoppers_products_do_not_wait_for_each_other(table: list[dict[str, Any]]) -> None:
    assert [entry for entry in table if entry["row"]["warnings"]] == []


def test_the_inner_loop_converts_no_integer_and_stores_no_weight(
    table: list[dict[str, Any]],
) -> None:
    assert {entry["row"]["int_to_float"] for entry in table} == {0}
    for entry in table:
        case = entry["case"]
        # For few rows scales and zeros are stored, as in the 4-bit matmul.
        vectors = 0
        if case["block_m"] == 8:
            vectors = max(1, 128 // case["group"]) * (1 + case["zeros"])
        assert entry["row"]["shared_stores"] <= vectors, entry


def test_weights_arrive_in_sixteen_byte_copies(table: list[dict[str, Any]]) -> None:
    for entry in table:
        case = entry["case"]
        steps = case["num_warps"] if case["block_m"] == 8 else 1  # at once
        bytes_each_row = 64 if case["group"] else 128
        bytes_each_lane = case["block_n"] * bytes_each_row * steps // (32 * case["num_warps"])
        assert entry["row"]["wide_copies"] >= bytes_each_lane // 16
