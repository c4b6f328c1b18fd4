"""What the assembler makes of the kernels of layers with states: registers, memory, tensor cores.

    python -m nybble.kernels.bench.recurrent_report [--quick] [--json]

Needs no GPU. The sizes are those of LFM2, Qwen3-Next and Qwen3.5.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from nybble.kernels.bench import cubin
from nybble.kernels.triton import recurrent

CAPABILITIES = (80, 89, 90, 100, 120)
KERNELS = {
    "convolution": recurrent.convolution_kernel,
    "by rows": recurrent.delta_rule_by_rows_kernel,
    "by chunks": recurrent.delta_rule_by_chunks_kernel,
}


@dataclass(frozen=True)
class Case:
    """One compilation."""

    kernel: str
    capability: int
    dtype: str


@dataclass(frozen=True)
class Row:
    """local: bytes of stack and local memory a thread takes, 0 if nothing is spilled."""

    registers: int
    shared: int
    local: int
    tensor_core: int


def cases(quick: bool) -> Iterator[Case]:
    """quick: few of each kind."""
    for kernel in KERNELS:
        for capability in (80, 90) if quick else CAPABILITIES:
            for dtype in ("bf16",) if quick else ("bf16", "fp16"):
                yield Case(kernel, capability, dtype)


def row(case: Case) -> Row:
    """Compile a case and count its instructions."""
    batch = dict.fromkeys(("query_start", "read", "write", "snapshot", "snapshot_rows"), "*i32")
    model = "*" + case.dtype
    constants: dict[str, object]
    aligned: tuple[str, ...]
    if case.kernel == "convolution":
        types = {"x": model, "weight": "*fp32", "bias": "*fp32", "state": model, "out": model}
        types |= batch | {"channels": "i32", "stride": "i32"}
        constants = {"TAPS": 4, "PADDED": 4, "HAS_BIAS": False, "ROWS": 16, "BLOCK": 64}
        aligned = ("channels", "stride")
    else:
        types = {"q": model, "k": model, "v": model, "g": "*fp32", "beta": "*fp32"}
        types |= {"state": "*fp32", "out": model} | batch
        aligned = ("q_stride", "k_stride", "v_stride", "key_heads", "value_heads")
        types |= dict.fromkeys(aligned, "i32") | {"scale": "fp32", "eps": "fp32"}
        constants = {"KEY_DIM": 128, "VALUE_DIM": 128, "KEYS": 128}
        constants |= {"VALUES": recurrent.VALUES, "CHUNK": recurrent.CHUNK}
    report = cubin.compile_kernel(
        KERNELS[case.kernel],
        types,
        constants,
        capability=case.capability,
        num_warps=8 if case.kernel == "by chunks" else 4,
        aligned=aligned,
    )
    return Row(
        registers=report.registers,
        shared=report.shared,
        local=report.local,
        tensor_core=report.count(*cubin.TENSOR_CORE),
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
