"""What the machine code of the kernels between the matmuls must look like, on an absent GPU."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")


ALL = pytest.param((), id="all", marks=pytest.mark.slow)
of_all = pytest.mark.parametrize("table", [ALL], indirect=True)


@cache
def compiled(*options: str) -> list[dict[str, Any]]:
    """One row per compiled kernel; the compiler needs a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "nybble.kernels.bench.step_report", *options, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(params=[pytest.param(("--quick",), id="some"), ALL])
def table(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return compiled(*request.param)


def of(table: list[dict[str, Any]], *kernels: str) -> list[dict[str, Any]]:
    found = [row for row in table if row["kernel"] in kernels]
    assert found
    return found


def test_attention_and_adapters_compile_from_ampere_to_blackwell(
    table: list[dict[str, Any]],
) -> None:
    assert {row["capability"] for row in of(table, "decode", "prefill")} == {80, 89, 90, 100}


def tolerated(row: dict[str, Any]) -> int:
    """Bytes that may be spilled outside the long loop: see kernels/README.md."""
    if row["kernel"] == "spans":
        return 160
    return {"prefill": 24, "decode": 8}.get(row["kernel"], 0) if "KV" in row["variant"] else 0


def test_no_register_is_spilled_but_for_a_few_outside_of_the_loop_that_walks_the_keys(
    table: list[dict[str, Any]],
) -> None:
    assert [row for row in table if row["spilled"] > tolerated(row)] == []
    # Heads of 256 in e4m3 on Hopper reload one register in it.
    assert [row for row in table if row["spilled_in_loop"] > (row["spilled"] <= 8)] == []


def test_hoppers_products_do_not_wait_for_each_other(table: list[dict[str, Any]]) -> None:
    assert [row for row in table if row["warnings"]] == []


def test_a_block_fits_the_shared_memory_of_its_gpu(table: list[dict[str, Any]]) -> None:
    limits = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
    assert [row for row in table if row["shared"] > limits[row["capability"]]] == []


@of_all
def test_every_head_dim_of_real_models_is_compiled(table: list[dict[str, Any]]) -> None:
    variants = {row["variant"] for row in of(table, "decode")}
    for model in ("llama-3", "qwen1.5", "phi-2", "phi-3", "gemma-2b", "gemma-7b", "gemma-2-9b"):
        assert any(variant.startswith(model) for variant in variants), model


def test_soft_caps_and_sinks_are_compiled(table: list[dict[str, Any]]) -> None:
    for kernel in ("decode", "prefill"):
        models = {row["variant"].split()[0] for row in of(table, kernel)}
        assert {"gemma-2-27b", "gpt-oss-20b"} <= models


@of_all
def test_soft_caps_and_sinks_are_compiled_with_16_bit_caches(table: list[dict[str, Any]]) -> None:
    for kernel in ("decode", "prefill"):
        variants = {row["variant"] for row in of(table, kernel)}
        assert {"gemma-2-27b bf16", "gpt-oss-20b bf16"} <= variants


def test_kernels_that_overlap_touch_nothing_before_the_one_before_has_ended(
    table: list[dict[str, Any]],
) -> None:
    found = [row for row in table if "overlapping" in row["variant"]]
    kernels = {"decode", "reduce", "add_rms_norm", "gated", "rotary_store", "sample"}
    assert {row["kernel"] for row in found} == kernels | {"lora shrink", "lora expand"}
    assert [row for row in found if row["early"]] == []
    # The others do not wait.
    assert all(row["early"] for row in table if "overlapping" not in row["variant"])


def test_products_run_on_tensor_cores(table: list[dict[str, Any]]) -> None:
    for row in of(
        table,
        "decode",
        "decode of few",
        "prefill",
        "spans",
        "fixed order",
        "lora shrink",
        "lora expand",
    ):
        assert row["tensor_core"] >= 2, row


def test_a_cache_in_8_bits_is_converted_four_bytes_at_a_time(table: list[dict[str, Any]]) -> None:
    found = [row for row in table if "KV" in row["variant"]]
    assert {row["kernel"] for row in found} >= {"decode", "prefill"}
    assert [row for row in found if row["by_byte"]] == []


def test_keys_values_and_adapters_are_loaded_sixteen_bytes_at_a_time(
    table: list[dict[str, Any]],
) -> None:
    # A tile of keys and one of values at each of its places (twice before the loop and in it), and
    # the queries; what is loaded in less are block tables, lengths and offsets. Of 8-bit caches a
    # tile has half the keys in half the bytes (two loads; one of heads of 64), and values take 8
    # bytes at a time, as products read them.
    for row in of(table, "decode", "prefill"):
        narrow = row["variant"].startswith(("qwen", "gpt-oss"))
        tile = 1 if narrow else 2
        assert row["wide_loads"] >= (3 * tile + 1 if "KV" in row["variant"] else 16 * tile), row
    for row in of(table, "spans"):
        tile = 1 if row["variant"].startswith(("qwen", "gpt-oss")) else 2
        assert row["wide_loads"] >= (3 * tile + 1 if "KV" in row["variant"] else 8 * tile), row
    for row in of(table, "fixed order"):
        assert row["wide_loads"] >= 6, row
    for row in of(table, "lora shrink", "rotary_store", "gated", "add_rms_norm", "sample"):
        assert row["wide_loads"] >= 2, row
