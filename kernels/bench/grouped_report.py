"""What the assembler makes of the experts' matmul: registers, shared memory and instructions.

    python -m nybble.kernels.bench.grouped_report [--quick] [--json]

Needs no GPU. The columns are those of :mod:`nybble.kernels.bench.matmul_report`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from nybble.kernels.bench import cubin
from nybble.kernels.layout import CodeKind
from nybble.kernels.triton.grouped import DENSE_STEP, block_sizes, grouped_kernel
from nybble.kernels.triton.grouped_few_rows import (
    BLOCK_N,
    FEW_ROWS,
    PARTS,
    grouped_few_rows_kernel,
)

CAPABILITIES = (80, 89, 90, 100, 120)
# Rows of all experts together, of 128: one block size each. 0 stands for a step of few rows.
PLACES = (0, 100, 4000, 8000)
# What --quick compiles, as (capability, places, codes, zeros, up): each kind of weight once, each
# kernel for an input of all experts and for one of each; and 16-bit weights.
_QUICK = {
    (80, 8000, "integer", False, False),
    (90, 8000, "integer", True, True),
    (90, 0, "e2m1", False, False),
    (90, 8000, "codebook", False, True),
    (120, 0, "integer", False, True),
}


@dataclass(frozen=True)
class Case:
    """One compilation.

    codes: see :data:`nybble.kernels.layout.CodeKind`; the scales of e2m1 are exponents, as MXFP4's.
    group: columns of a scale; 0 for 16-bit weights.
    up: gate and up, as they are stored, from one input for all experts of a row; otherwise down,
        whose results are weighted.
    """

    capability: int
    dtype: str
    codes: CodeKind
    zeros: bool
    group: int
    up: bool
    block_n: int
    block_m: int
    num_warps: int


@dataclass(frozen=True)
class Row:
    registers: int
    shared: int
    local: int
    spill: int
    wide_copies: int
    tensor_core: int
    int_to_float: int
    shared_stores: int
    warnings: int
    loop: int


def cases(quick: bool) -> Iterator[Case]:
    """quick: few of each kind."""
    kinds: tuple[tuple[str, CodeKind, bool, int], ...] = (
        ("bf16", "integer", False, 128),
        ("fp16", "integer", True, 32),
        ("bf16", "e2m1", False, 32),
        ("bf16", "codebook", False, 64),
    )
    for capability, places in itertools.product(CAPABILITIES, PLACES):
        # All kinds are compiled for Hopper, one of each generation beside it.
        for kind in kinds if capability == 90 else kinds[:1]:
            for up in (True, False):
                if quick and (capability, places, kind[1], kind[2], up) not in _QUICK:
                    continue
                sizes = block_sizes(places, 128) if places else (BLOCK_N, FEW_ROWS, PARTS)
                yield Case(capability, *kind, up, *sizes)
        # 16-bit weights have no kernel for few rows.
        if places and (not quick or (capability, places) == (90, 8000)):
            yield Case(capability, "bf16", "integer", False, 0, True, *block_sizes(places, 128))


def compiled(case: Case) -> cubin.Report:
    types = {
        "x": "*" + case.dtype,
        "matrices": "*i16" if case.group else "*" + case.dtype,
        "scales": "*u8" if case.codes == "e2m1" else "*fp16",
        "zeros": "*fp16",
        "levels": "*fp32",
        "bias": "*fp16",
        "weights": "*fp32",
        "out": "*" + (case.dtype if case.up else "fp32"),
        **dict.fromkeys(("order", "expert_of", "first_of", "end_of"), "*i32"),
        **dict.fromkeys(("places", "out_features", "columns", "groups"), "i32"),
    }
    constants = {
        "TOP_K": 8,
        "X_PER_EXPERT": not case.up,
        "WEIGHTED": not case.up,
        "CODES": case.codes,
        "HAS_ZEROS": case.zeros,
        "HAS_BIAS": True,
        "GATED": case.up and case.group > 0,
        "GROUP": case.group,
        "SETS": max(1, 128 // case.group) if case.group else 1,
        "WHOLE_STEPS": True,
        "BLOCK_N": case.block_n,
        "BLOCK_M": case.block_m,
    }
    few = case.block_m == FEW_ROWS
    dense = case.group == 0
    constants |= (
        {"PARTS": PARTS} if few else {"DENSE": dense, "WIDTH": DENSE_STEP if dense else 128}
    )
    return cubin.compile_kernel(
        grouped_few_rows_kernel if few else grouped_kernel,
        types,
        constants,
        capability=case.capability,
        num_warps=case.num_warps,
        aligned=("out_features", "columns"),
    )


def row(case: Case) -> Row:
    """Compile a case and count its instructions."""
    report = compiled(case)
    loop = report.tensor_core_loop()
    counts = cubin.opcodes(loop)
    return Row(
        registers=report.registers,
        shared=report.shared,
        local=report.local,
        spill=counts["LDL"] + counts["STL"],
        wide_copies=sum(i.opcode.startswith("LDGSTS") and ".128" in i.opcode for i in loop),
        tensor_core=sum(n for code, n in counts.items() if code in cubin.TENSOR_CORE),
        int_to_float=counts["I2F"] + counts["I2FP"],
        shared_stores=counts["STS"] + counts["STSM"],
        warnings=len(report.warnings),
        loop=len(loop),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few of each kind")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    found = list(cases(arguments.quick))
    with ProcessPoolExecutor(cubin.COMPILERS) as pool:
        for case, counted in zip(found, pool.map(row, found), strict=True):
            if arguments.json:
                print(json.dumps({"case": asdict(case), "row": asdict(counted)}), flush=True)
            else:
                print(case, counted, flush=True)


if __name__ == "__main__":
    main()
