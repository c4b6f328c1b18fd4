"""What the GPU's machine code must look like, read from cubins compiled without a GPU."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")


ALL = pytest.param("--all", id="all", marks=pytest.mark.slow)
of_all = pytest.mark.parametrize("table", [ALL], indirect=True)


@cache
def compiled(option: str) -> list[dict[str, Any]]:
    """One row for a shipped configuration: of each kind some, or all of them.

    The compiler needs a process of its own. What compiles to a trap, as a failed compilation may,
    ends that process.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "nybble.kernels.bench.matmul_report", option, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=[pytest.param("--quick", id="some"), ALL])
def table(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return compiled(request.param)


def test_the_matmul_compiles_for_ampere_ada_hopper_and_blackwell(
    table: list[dict[str, Any]],
) -> None:
    assert {entry["case"]["capability"] for entry in table} == {80, 89, 90, 100, 120}


def test_no_register_is_spilled_inside_the_loop_or_outside_it(table: list[dict[str, Any]]) -> None:
    assert [e for e in table if e["row"]["spill"] or e["row"]["local"]] == []


@of_all
def test_every_kind_of_weight_is_compiled_for_the_largest_blocks_on_hopper(
    table: list[dict[str, Any]],
) -> None:
    largest = [
        e["case"]
        for e in table
        if e["case"]["capability"] == 90 and e["case"]["config"]["block_m"] == 256
    ]
    kinds = {(case["codes"], case["zeros"], case["gated"]) for case in largest}
    assert kinds == {
        ("integer", False, False),
        ("integer", False, True),
        ("codebook", False, False),
        ("e2m1", False, False),
        ("integer", True, False),
    }


def test_shared_memory_fits_the_device(table: list[dict[str, Any]]) -> None:
    limit = {
        80: 163,
        89: 99,
        90: 227,
        100: 227,
        120: 99,
    }  # KiB a block may take, CUDA programming guide
    for entry in table:
        assert entry["row"]["shared"] <= limit[entry["case"]["capability"]] << 10


def test_products_run_on_tensor_cores(table: list[dict[str, Any]]) -> None:
    for entry in table:
        # Blackwell's instructions are issued by one thread and multiply whole blocks.
        fewest = 1 if entry["case"]["capability"] == 100 else 8
        assert entry["row"]["tensor_core"] >= fewest


def test_hoppers_products_do_not_wait_for_each_other(table: list[dict[str, Any]]) -> None:
    """ptxas makes each wait (C7515) if it cannot follow the sums through the loop."""
    asynchronous = [e for e in table if e["row"]["waits"]]
    assert {64, 256} <= {e["case"]["config"]["block_m"] for e in asynchronous}
    for entry in asynchronous:
        assert entry["row"]["waits"] <= entry["row"]["tensor_core"] // 2, entry
    assert [entry for entry in table if entry["row"]["warnings"]] == []


def test_two_blocks_of_33_to_128_rows_share_a_multiprocessor_of_hopper(
    table: list[dict[str, Any]],
) -> None:
    shared = [
        e["row"]
        for e in table
        if e["case"]["capability"] == 90
        and (e["case"]["config"]["block_n"], e["case"]["config"]["block_m"]) == (128, 64)
        and e["case"]["whole_steps"]
    ]
    assert shared
    for row in shared:
        assert row["registers"] * 256 * 2 <= 65_536, row
        assert row["shared"] * 2 <= 228 << 10, row


def test_the_inner_loop_converts_no_integer_to_float(table: list[dict[str, Any]]) -> None:
    assert {entry["row"]["int_to_float"] for entry in table} == {0}


def test_unpacked_weights_never_pass_through_shared_memory(table: list[dict[str, Any]]) -> None:
    for entry in table:
        if entry["case"]["capability"] == 100 and entry["case"]["config"]["scale_first"]:
            continue  # one wide product: tensor cores there read it from shared memory
        if not entry["case"]["whole_steps"]:
            continue  # x, at no multiple of 16 bytes, is stored there too
        # Scales and zeros may: a vector of each for every group in 128 columns.
        vectors = max(1, 128 // entry["case"]["group"]) * (1 + entry["case"]["zeros"])
        assert entry["row"]["shared_stores"] <= vectors


def test_weights_do_not_move_between_registers_where_tensor_cores_are_amperes(
    table: list[dict[str, Any]],
) -> None:
    """sm_120 has no tensor memory: a step in one product takes 3.8 bit operations a weight."""
    plain = [
        e
        for e in table
        if e["case"]["codes"] == "integer" and e["case"]["capability"] in (80, 89, 120)
    ]
    assert any(e["case"]["capability"] == 120 for e in plain)
    for entry in plain:
        each = entry["row"]["loop"] / entry["row"]["per_weight"]
        assert entry["row"]["bit_ops"] < 2 * each, entry


def test_floats_of_4_bits_take_fewer_operations_than_a_codebook(
    table: list[dict[str, Any]],
) -> None:
    """Nine of bits for eight weights, and at most six beside them for each 32 (a codebook: 21)."""
    found = [e for e in table if e["case"]["codes"] == "e2m1" and e["case"]["group"] == 32]
    assert found
    for entry in found:
        weights = entry["row"]["loop"] / entry["row"]["per_weight"]
        assert entry["row"]["bit_ops"] < 1.4 * weights, entry


def test_weights_arrive_in_sixteen_byte_copies(table: list[dict[str, Any]]) -> None:
    for entry in table:
        config = entry["case"]["config"]
        bytes_each_lane = config["block_n"] * 64 // (32 * config["num_warps"])
        assert entry["row"]["wide_copies"] >= bytes_each_lane // 16


def test_parts_of_many_rows_are_stored_and_read_sixteen_bytes_at_a_time(
    table: list[dict[str, Any]],
) -> None:
    split = [e for e in table if e["case"]["config"]["splits"] > 1]
    many = [e for e in split if e["case"]["config"]["scale_first"]]
    assert many
    for entry in many:
        config = entry["case"]["config"]
        threads = 32 * config["num_warps"]
        each = config["block_n"] * config["block_m"] // threads // 4
        assert entry["row"]["wide_parts"] >= 2 * each, entry


def test_the_launcher_compiles_once_for_all_row_counts_of_a_bucket() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("jit_without_gpu.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["matmul_kernel 1"] * 3 + ["few_rows_kernel 1"] * 2
