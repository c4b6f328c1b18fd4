"""What the machine code of the kernels of latent attention must look like, on an absent GPU."""

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
    module = "nybble.kernels.bench.latent_report"
    command = [sys.executable, "-m", module, *request.param, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def attention(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in table if row["kernel"] in ("latent decode", "latent prefill")]


def test_they_compile_for_ampere_and_hopper(table: list[dict[str, Any]]) -> None:
    assert {80, 90} <= {row["capability"] for row in attention(table)}


def test_no_register_is_spilled(table: list[dict[str, Any]]) -> None:
    assert [row for row in table if row["spilled"]] == []


def test_a_block_fits_the_shared_memory_of_its_gpu(table: list[dict[str, Any]]) -> None:
    limits = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB, CUDA programming guide
    assert [row for row in table if row["shared"] > limits[row["capability"]] << 10] == []


def test_products_run_on_tensor_cores(table: list[dict[str, Any]]) -> None:
    # For each 16 queries 36 slices of entries are multiplied with keys, which 8 warps share, and
    # each warp sums 64 of 512 entries, for each 16 keys.
    for row in attention(table):
        heads = 1 if row["kernel"] == "latent decode" and "v2-lite" in row["variant"] else 2
        slices = 1 if "KV" in row["variant"] else 2
        assert row["tensor_core"] >= heads * (36 + 8 * slices), row


def test_rows_are_loaded_once_by_sixteen_bytes(table: list[dict[str, Any]]) -> None:
    for row in attention(table):
        # A tile is loaded at each of its places: once or twice before the loop, and in it. The
        # latents of 8-bit ones are loaded as values too, 8 bytes at a time. Queries come once.
        few = row["kernel"] == "latent decode" and "v2-lite" in row["variant"]
        if "KV" in row["variant"]:
            tiles = 3 * (4 if few else 2)
        else:
            tiles = 9 * (2 if row["capability"] in (89, 120) else 3)
        assert tiles + 4 <= row["wide_loads"] <= tiles + 9, row
