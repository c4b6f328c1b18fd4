"""What the assembler makes of the kernels of layers with states: registers, memory, tensor cores.

    python -m nybble.kernels.bench.recurrent_report [--quick] [--json]

Needs no GPU. The sizes are those of LFM2, Qwen3-Next, Qwen3.5, Granite 4 and Falcon-H1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from nybble.kernels.bench import cubin
from nybble.kernels.triton import recurrent, state_space

CAPABILITIES = (80, 89, 90, 100, 120)
KERNELS = {
    "convolution": recurrent.convolution_kernel,
    "by rows": recurrent.delta_rule_by_rows_kernel,
    "by chunks": recurrent.delta_rule_by_chunks_kernel,
    "scan by rows": state_space.scan_by_rows_kernel,
    "scan by chunks": state_space.scan_by_chunks_kernel,
    "gated norm": state_space.gated_norm_kernel,
}
_WARPS = {
    "by chunks": 8,
    "scan by rows": state_space.BY_ROWS_WARPS,
    "scan by chunks": state_space.BY_CHUNKS_WARPS,
    "gated norm": 8,
}


@dataclass(frozen=True)
class Case:
    """One compilation.

    state_dim: of a state space; 128 for the other kernels.
    """

    kernel: str
    capability: int
    dtype: str
    state_dim: int = 128


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
        scans = kernel.startswith("scan")
        some = (80,) if scans or kernel == "by chunks" else (90,)
        for capability in some if quick else CAPABILITIES:
            for dtype in ("bf16",) if quick else ("bf16", "fp16"):
                if not (scans and quick):
                    yield Case(kernel, capability, dtype)
                if scans:
                    yield Case(kernel, capability, dtype, state_dim=256)


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
    elif case.kernel == "gated norm":
        types = {"x": "*fp32", "gate": model, "weight": model, "out": model}
        types |= {"gate_stride": "i32", "groups": "i32", "width": "i32", "eps": "fp32"}
        constants = {"WIDTH": 2048}
        aligned = ("gate_stride", "width")
    elif case.kernel.startswith("scan"):
        types = {"x": model, "b": model, "c": model, "dt": "*fp32", "g": "*fp32"}
        types |= {"state": "*fp32", "out": "*fp32"} | batch
        aligned = ("x_stride", "b_stride", "c_stride")
        types |= dict.fromkeys((*aligned, "groups", "heads"), "i32")
        constants = {"STATE_DIM": case.state_dim, "HEAD_DIM": 64, "KEYS": case.state_dim}
        constants |= {"VALUES": state_space.VALUES, "CHUNK": state_space.CHUNK}
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
        num_warps=_WARPS.get(case.kernel, 4),
        aligned=aligned,
    )
    return Row(
        registers=report.registers,
        shared=report.shared,
        local=report.local,
        # The disassembler takes as long as a small kernel, and the others have no products.
        tensor_core=report.count(*cubin.TENSOR_CORE) if "mma" in report.ptx else 0,
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
