"""The GPU kernels as compiled, their PTX run by an emulator, compute what their references do.

The interpreter runs what the kernels say; this runs what the compiler made of it, with the inline
PTX, the layouts of tensor cores and of shared memory, asynchronous copies and barriers in it. The
emulator is in this folder. Warps and copies may come in any order: each kernel runs one problem in
one of two orders here, as compiled for Hopper, but for those that take longest (see SLOW); ``make
test-all`` runs all problems of all of them in both orders on all GPUs. ``checks.py --all`` tries
more combinations, and ``make emulate`` random ones for as long as it is given.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

KERNELS = {
    "decode_kernel",
    "dequantize_kernel",
    "draw_kernel",
    "expand_kernel",
    "few_rows_kernel",
    "fixed_order_kernel",
    "gated_kernel",
    "grouped_few_rows_kernel",
    "grouped_kernel",
    "largest_kernel",
    "latent_decode_kernel",
    "latent_prefill_kernel",
    "latent_store_kernel",
    "matmul_kernel",
    "merge_kernel",
    "prefill_kernel",
    "reduce_kernel",
    "rms_norm_kernel",
    "rotary_store_kernel",
    "shrink_kernel",
    "spans_kernel",
}


def run(*arguments: str, script: str = "checks.py") -> subprocess.CompletedProcess[str]:
    """The compiler needs a process without TRITON_INTERPRET."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# What the families here do not run, because they take most of the time: the 4-bit matmul,
# attention, and sums in one order for `--deterministic`.
SLOW = {
    *("matmul_kernel", "few_rows_kernel", "gated_kernel", "reduce_kernel"),
    *("decode_kernel", "prefill_kernel", "fixed_order_kernel", "merge_kernel", "spans_kernel"),
}
HOPPER = ["--quick", "--few", "--capability", "90"]
FAMILIES = (*("dequantize", "latent", "rotary", "lora", "norm", "sampling", "grouped"),)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(([*HOPPER, "--families", *FAMILIES], {90}), id="Hopper"),
        pytest.param(([], {80, 89, 90, 100}), id="all", marks=pytest.mark.slow),
    ],
)
def comparisons(request: pytest.FixtureRequest) -> dict[int, list[dict[str, Any]]]:
    """What was compared on each GPU: a little in one order on Hopper, or all in both on all."""
    arguments, capabilities = request.param
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    found: dict[int, list[dict[str, Any]]] = {each: [] for each in capabilities}
    for line in done.stdout.splitlines():
        comparison = json.loads(line)
        found[comparison["capability"]].append(comparison)
    return found


def wrong(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert comparisons
    return [each for each in comparisons if not each["error"] <= each["limit"]]  # NaN is wrong too


def test_compiled_kernels_compute_what_their_references_do(
    comparisons: dict[int, list[dict[str, Any]]],
) -> None:
    for own in comparisons.values():
        assert wrong(own) == []


def test_every_kernel_was_run(comparisons: dict[int, list[dict[str, Any]]]) -> None:
    for capability in comparisons.keys() - {89}:  # Ada only differs in 8-bit floats
        run_there = {kernel for each in comparisons[capability] for kernel in each["kernels"]}
        assert run_there | SLOW == KERNELS
        assert run_there == KERNELS or len(comparisons) == 1


@pytest.mark.slow
def test_amperes_products_are_what_the_references_compute() -> None:
    """It has instructions of its own for them; the other kernels are compiled to much the same."""
    done = run("--quick", "--capability", "80", "--families", "matmul", "attention")
    assert done.returncode == 0, done.stderr
    assert wrong([json.loads(line) for line in done.stdout.splitlines()]) == []


@pytest.mark.parametrize(
    ("capability", "family", "instruction"),
    [
        pytest.param("80", "lora", "bar.sync", marks=pytest.mark.slow),
        pytest.param("90", "attention", "wgmma.wait_group", marks=pytest.mark.slow),
        pytest.param("80", "lora", "cp.async.wait_group", marks=pytest.mark.slow),
        pytest.param("100", "attention", "tcgen05.wait::st", marks=pytest.mark.slow),
        pytest.param("100", "attention", "fence.proxy.async", marks=pytest.mark.slow),
        # A part is counted before all of it is stored.
        pytest.param("90", "parts", "bar.sync before atom", marks=pytest.mark.slow),
        # A part is never counted.
        pytest.param("90", "parts", "atom", marks=pytest.mark.slow),
    ],
)
def test_the_emulator_notices_what_a_gpu_would_trip_over(
    capability: str, family: str, instruction: str
) -> None:
    done = run("--capability", capability, "--families", family, "--without", instruction)
    assert done.returncode == 0, done.stderr
    assert wrong([json.loads(line) for line in done.stdout.splitlines()])


@pytest.mark.parametrize(
    "family", ["fixed order", pytest.param("attention", marks=pytest.mark.slow)]
)
def test_a_wait_that_nothing_ends_is_an_error(family: str) -> None:
    without = ("--without", "tcgen05.commit")
    done = run("--capability", "100", "--families", family, *without)
    assert done.returncode != 0
    assert "a wait that never ends" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_random_problems_are_computed_as_their_references_do(capability: str) -> None:
    """Small ones that have both codebooks and the head_dims that the fixed comparisons lack."""
    seeds = ("45", "50", "53", "97", "210")
    done = run("--capability", capability, "--only", *seeds, script="random_checks.py")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each for each in found if not each["right"]] == []
    assert done.returncode == 0, done.stderr
    names = " ".join(each["name"] for each in found)
    for subject in ("nf4", "silu", "fp4", "7×1×96", "7×2×256", "4×1×80", "cap", "sinks"):
        assert subject in names


@pytest.mark.slow
def test_a_random_problem_that_comes_out_wrong_fails_the_run() -> None:
    options = ("--capability", "80", "--only", "97", "--without", "bar.sync")
    done = run(*options, script="random_checks.py")
    assert [json.loads(line)["right"] for line in done.stdout.splitlines()] == [False]
    assert done.returncode == 1
