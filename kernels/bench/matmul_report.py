"""What the assembler makes of the matmul: registers, shared memory and instructions of each shape.

    python -m nybble.kernels.bench.matmul_report [--all] [--json]

Needs no GPU. ``regs`` is registers per thread, ``shared`` bytes of shared memory per block, and
``local`` bytes of local memory per thread, which cost nothing if they are used only before and
after the loop. The other columns count instructions in the inner loop, over 128 columns:

- ``spill``: loads from and stores to local memory.
- ``16B``: 16-byte copies to shared memory.
- ``mma``: tensor-core products.
- ``wait``: waits for Hopper's products. If there are as many as products, the assembler has made
  each product wait for the one before.
- ``i2f``: conversions from integer to float.
- ``sts``: stores to shared memory. Weights need none, because they do not move between lanes.
- ``bits``: bit operations.
- ``half``: 16-bit float operations.
- ``all``: all instructions; ``/weight`` is that number per weight which a thread unpacks.

``parts`` counts 16-byte loads and stores of global memory outside the loop, as of parts. ``warn``
counts warnings that products wait for one another.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace

from nybble.kernels.bench import cubin
from nybble.kernels.layout import CodeKind
from nybble.kernels.triton.configs import SHIPPED, Config, default_config, for_group, read
from nybble.kernels.triton.few_rows import few_rows_kernel
from nybble.kernels.triton.matmul import joined, matmul_kernel, max_registers


@dataclass(frozen=True)
class Case:
    """One compilation: everything that changes the code of the kernel.

    capability: compute capability, 90 for sm_90.
    dtype: of the activations, in Triton's words.
    codes: what the codes are, see :data:`nybble.kernels.layout.CodeKind`.
    zeros: whether each group has a zero point.
    group: columns per scale.
    gated: with the activation of a gated weight in the product.
    whole_steps: whether the columns are a multiple of 128.
    """

    capability: int
    dtype: str
    codes: CodeKind
    zeros: bool
    group: int
    config: Config
    gated: bool = False
    whole_steps: bool = True


@dataclass(frozen=True)
class Row:
    """One line of the table; see the module's description."""

    registers: int
    shared: int
    local: int
    spill: int
    wide_copies: int
    tensor_core: int
    waits: int
    int_to_float: int
    shared_stores: int
    bit_ops: int
    half_ops: int
    loop: int
    per_weight: float
    wide_parts: int
    warnings: int


# What --quick compiles, as (capability, codes, zeros, group, gated, rows of a block, overlap): each
# kind of weight and of product once, and each generation.
_QUICK = {
    (90, "codebook", False, 64, False, 8, True),
    (90, "integer", False, 128, False, 64, False),
    (90, "integer", False, 128, True, 256, False),
    (80, "e2m1", False, 32, False, 8, False),
    (89, "integer", True, 32, False, 16, False),
    (100, "integer", False, 128, False, 128, False),
    (120, "integer", False, 128, False, 128, False),
    (120, "integer", True, 16, False, 128, False),  # spilled where ptxas chose how many registers
}


def quick() -> Iterator[Case]:
    """The least of the shipped configurations that has each kind of weight and of product."""
    left = set(_QUICK)
    for case in shipped(everything=True):
        c = case.config
        kind = (case.codes, case.zeros, case.group, case.gated, c.block_m, c.overlap)
        if (case.capability, *kind) in left:
            left.remove((case.capability, *kind))
            yield case
    assert not left


def shipped(everything: bool) -> Iterator[Case]:
    """The shipped configurations: those of the rule for each bucket, and the measured ones.

    everything: all of them for every kind of weight; otherwise a sample of each kind.
    """
    measured = [c for entries in read(SHIPPED).values() for c in entries.values()]
    for capability in (90, 80, 89, 100, 120):
        ruled = [
            default_config(bucket, 22016, 4096, capability=capability)
            for bucket in (2, 8, 16, 32, 64, 128, 256, 1024)
        ]
        # Only whether the work is split is compiled in, not into how many parts.
        ruled = [replace(config, splits=2, tail=min(config.tail, 1)) for config in ruled]
        # Llama-2-13B's o: two parts, of which the first is longer.
        ruled.append(default_config(256, 5120, 5120, capability=capability))
        few, some, largest = ruled[1], ruled[2], ruled[7:9]
        most = largest[0] if capability == 90 else largest[1]
        if capability == 90:
            ruled += [replace(config, overlap=True) for config in ruled[1:3]]
        configs = dict.fromkeys(ruled + (measured if capability == 90 else []))
        sample = dict.fromkeys((few, some, ruled[4], ruled[6], most, *ruled[8:]))
        for config in configs if everything else sample:
            sampled = {90: (config,), 100: (few, most), 120: (most,)}.get(capability, ())
            if everything or config in sampled:
                yield Case(capability, "bf16", "integer", False, 128, config)
                if config in (few, some, most) or (everything and config in largest):
                    yield Case(capability, "bf16", "integer", False, 128, config, gated=True)
            if everything or (capability == 90 and not config.overlap):
                yield Case(capability, "bf16", "codebook", False, 64, config)
            if everything or (capability in (80, 90) and config in (few, most)):
                yield Case(capability, "bf16", "e2m1", False, 32, config)
            if (
                everything
                or (capability < 100 and config == some)
                or (capability == 90 and config == most)
            ):
                yield Case(capability, "fp16", "integer", True, 32, config)
        for config in configs if everything else (few, most) if capability < 100 else (few,):
            if not config.dense:
                yield Case(capability, "bf16", "e2m1", False, 16, for_group(config, 16))
                yield Case(capability, "fp16", "integer", True, 16, for_group(config, 16))
        # On sm_89 the largest block comes closest to the limit of bit operations.
        if capability == 89 or (everything and capability < 100):
            for bucket in (8, 16, 64, 256) if everything else (256,):
                odd = replace(default_config(bucket, 22016, 4001, capability=capability), tail=0)
                yield Case(capability, "bf16", "integer", False, 128, odd, whole_steps=False)


def compiled(case: Case) -> cubin.Report:
    """Compile one case: for sizes that are multiples of 128, or odd columns if not whole_steps."""
    c = case.config
    types = {
        "x": "*" + case.dtype,
        "qweight": "*i16",
        "scales": "*fp16",
        "zeros": "*fp16",
        "levels": "*fp32",
        "bias": "*fp16",
        "out": "*" + case.dtype,
        "parts": "*fp32",
        "arrivals": "*i32",
    }
    numbers = ("rows", "out_features", "columns", "groups", "whole", "splits", "steps_each")
    constants = {
        "CODES": case.codes,
        "HAS_ZEROS": case.zeros,
        "HAS_BIAS": True,
        "GATED": case.gated,
        "ACTIVATION": "silu" if case.gated else None,
        "GROUP": case.group,
        "SETS": max(1, 128 // case.group),
        "SCALE_FIRST": c.scale_first,
        "JOINED": joined(c, case.capability, case.whole_steps),
        "SPLIT": c.splits > 1,
        "PAIR": c.splits > 1 and c.lead > 0,
        "TAIL": c.tail > 0,
        "OVERLAP": c.overlap and case.capability >= 90,
        "WHOLE_STEPS": case.whole_steps,
        "BLOCK_N": c.block_n,
        "BLOCK_M": c.block_m,
        "GROUP_M": 8,
        "PARTS": c.parts,
    }
    kernel = few_rows_kernel if c.parts > 1 else matmul_kernel
    arguments = {**types, **dict.fromkeys(numbers, "i32")}
    return cubin.compile_kernel(
        kernel,
        {name: type_ for name, type_ in arguments.items() if name in kernel.arg_names},
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        capability=case.capability,
        num_warps=c.parts if c.parts > 1 else c.num_warps,
        num_stages=c.num_stages,
        max_registers=max_registers(c, case.group, case.capability, case.whole_steps),
        aligned=("out_features", "columns") if case.whole_steps else ("out_features",),
    )


def row(case: Case) -> Row:
    """Compile a case and count its instructions."""
    report = compiled(case)
    loop = report.tensor_core_loop()
    counts = cubin.opcodes(loop)
    c = case.config
    weights = c.block_n * 128 / (32 * (1 if c.parts > 1 else c.num_warps))
    return Row(
        registers=report.registers,
        shared=report.shared,
        local=report.local,
        spill=counts["LDL"] + counts["STL"],
        wide_copies=sum(i.opcode.startswith("LDGSTS") and ".128" in i.opcode for i in loop),
        tensor_core=sum(n for code, n in counts.items() if code in cubin.TENSOR_CORE),
        waits=sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in loop),
        int_to_float=counts["I2F"] + counts["I2FP"],
        shared_stores=counts["STS"] + counts["STSM"],
        bit_ops=sum(counts[code] for code in ("LOP3", "PRMT", "SHF")),
        half_ops=sum(counts[code] for code in ("HADD2", "HMUL2", "HFMA2")),
        loop=len(loop),
        per_weight=round(len(loop) / weights, 2),
        wide_parts=sum(
            i.opcode.startswith(("LDG.", "STG.")) and ".128" in i.opcode
            for i in report.instructions
            if i not in loop
        ),
        warnings=len(report.warnings),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every shipped configuration")
    parser.add_argument("--quick", action="store_true", help="the least that has each kind")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if not arguments.json:
        print(
            f"{'sm':>4}{'x':>5}  {'weights':<14}{'n × m':>10}{'warps':>6}{'regs':>6}{'shared':>8}"
            f"{'local':>6}{'spill':>6}{'16B':>4}{'mma':>5}{'wait':>5}{'i2f':>4}{'sts':>4}{'bits':>5}{'half':>5}"
            f"{'all':>5}{'/weight':>8}{'parts':>6}{'warn':>5}"
        )
    cases = list(quick() if arguments.quick else shipped(arguments.all))
    with ProcessPoolExecutor(cubin.COMPILERS) as pool:
        for case, r in zip(cases, pool.map(row, cases), strict=True):
            c = case.config
            if arguments.json:
                print(json.dumps({"case": asdict(case), "row": asdict(r)}), flush=True)
                continue
            shape = f"{c.block_n}×{c.block_m}" + (f"×{c.parts}" if c.parts > 1 else "")
            kind = {"integer": "affine"}.get(case.codes, case.codes) + "+z" * case.zeros
            print(
                f"{case.capability:>4}{case.dtype:>5}  {kind + ' g' + str(case.group):<14}"
                f"{shape:>10}{max(c.num_warps, c.parts):>6}{r.registers:>6}{r.shared:>8}"
                f"{r.local:>6}{r.spill:>6}{r.wide_copies:>4}{r.tensor_core:>5}{r.waits:>5}{r.int_to_float:>4}"
                f"{r.shared_stores:>4}{r.bit_ops:>5}{r.half_ops:>5}{r.loop:>5}{r.per_weight:>8}{r.wide_parts:>6}{r.warnings:>5}",
                flush=True,
            )


if __name__ == "__main__":
    main()
