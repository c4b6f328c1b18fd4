"""What the compiler makes of a decode step's other kernels, for GPUs that need not be present.

``python -m nybble.kernels.bench.step_report [--capability 90 …] [--json]`` compiles every kernel
at the sizes of a model family and prints registers, shared memory, spills and the instructions that
matter. ``--quick`` leaves out sizes that compile alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

from nybble.kernels.activation import ACTIVATIONS
from nybble.kernels.bench.cubin import COMPILERS, TENSOR_CORE, Report, compile_kernel
from nybble.kernels.triton import (
    activation,
    attention_decode,
    attention_fixed,
    attention_prefill,
    attention_splits,
    fixed_order,
    lora,
    norm,
    rotary,
    sampling,
)

CAPABILITIES = (80, 89, 90, 100)


class Heads(NamedTuple):
    """The settings of a model's attention that change the code. group: query heads per KV head."""

    group: int
    dim: int
    softcap: float = 0.0
    sinks: bool = False


Kind = TypeVar("Kind")

_HEADS = {
    "llama-2-13b": Heads(1, 128),
    "llama-3-8b": Heads(4, 128),
    "qwen2.5-0.5b": Heads(7, 64),
    "qwen1.5-0.5b": Heads(1, 64),
    "phi-2": Heads(1, 80),
    "phi-3-mini": Heads(1, 96),
    "gemma-7b": Heads(1, 256),
    "gemma-2b": Heads(8, 256),
    "gemma-2-9b": Heads(2, 256, softcap=50.0),
    "gemma-2-27b": Heads(2, 128, softcap=50.0),
    "gpt-oss-20b": Heads(8, 64, sinks=True),
}
# Instructions that access global memory.
_GLOBAL = ("LDG", "STG", "ATOM", "RED", "LD.", "ST.")
# The dtype of the activations, and of the KV cache if it is another; e4m3 needs sm_89.
_CACHES = {
    "fp16": ("*fp16", None),
    "bf16": ("*bf16", None),
    "bf16, int8 KV": ("*bf16", "*i8"),
    "bf16, fp8 KV": ("*bf16", "*fp8e4nv"),
}
# The kernels of attention which --quick compiles: each kernel once at least (decode in
# bfloat16 as it overlaps with others), every setting, every dtype of a cache, and each generation's
# products.
_QUICK = {
    ("gpt-oss-20b bf16", 80): ("decode of few", "spans"),
    ("gpt-oss-20b bf16, int8 KV", 80): ("prefill",),
    ("gpt-oss-20b bf16, fp8 KV", 89): ("decode",),
    ("gemma-2-27b bf16", 90): ("prefill",),
    ("gpt-oss-20b bf16", 100): ("prefill",),
}
_ATTENTION = ("decode", "decode of few", "prefill", "spans")
# Of the products of one order, which have a group (0: 16 bits), a dtype and perhaps a gate.
_FIXED_ORDER = {
    "affine g128": (128, "*bf16", False),
    "affine g128, gated": (128, "*bf16", True),
    "codebook g64": (64, "*bf16", False),
    "affine g32 with zeros": (32, "*fp16", False),
    "16 bits": (0, "*bf16", False),
}
_QUICK_FIXED_ORDER = {("affine g128, gated", 90)}


@dataclass(frozen=True)
class Row:
    """One compiled variant of a kernel.

    registers: per thread.
    shared: bytes of shared memory per block.
    spilled: bytes of local memory per thread.
    spilled_in_loop: accesses to it in the innermost loop with products.
    tensor_core: tensor-core products.
    loop: instructions of that loop.
    by_byte: of those, loads of single bytes from shared memory, and conversions from integers.
    wide_loads: 16-byte loads from global memory, asynchronous or not.
    loads: all loads from global memory.
    early: accesses to global memory before the wait for the kernel before; all if there is none.
    warnings: of the assembler, that Hopper's products wait for one another.
    """

    kernel: str
    variant: str
    capability: int
    registers: int
    shared: int
    spilled: int
    spilled_in_loop: int
    tensor_core: int
    loop: int
    by_byte: int
    wide_loads: int
    loads: int
    early: int
    warnings: int

    @classmethod
    def of(cls, kernel: str, variant: str, capability: int, report: Report) -> Row:
        loop = report.tensor_core_loop()
        loads = [i for i in report.instructions if i.opcode.startswith(("LDG", "LDGSTS"))]
        waits = [i.address for i in report.instructions if i.opcode.startswith("ACQBULK")]
        accesses = [i for i in report.instructions if i.opcode.startswith(_GLOBAL)]
        return cls(
            kernel,
            variant,
            capability,
            report.registers,
            report.shared,
            report.local,
            sum(i.opcode.startswith(("LDL", "STL")) for i in loop),
            report.count(*TENSOR_CORE),
            len(loop),
            sum(i.opcode.startswith(("LDS.U8", "LDS.S8", "I2F")) for i in loop),
            sum(".128" in i.opcode for i in loads),
            len(loads),
            sum(not waits or i.address < waits[0] for i in accesses),
            len(report.warnings),
        )


def rows(capability: int, quick: bool = False) -> Iterator[Row]:
    """Every kernel at every size, compiled for one compute capability."""
    for model, heads in _HEADS.items():
        for cache, (dtype, kv) in _CACHES.items():
            variant = f"{model} {cache}"
            if kv == "*fp8e4nv" and capability < 89:
                continue
            kernels = _QUICK.get((variant, capability), ()) if quick else _ATTENTION
            yield from _attention(variant, heads, dtype, capability, kv, kernels)
    for kind in _FIXED_ORDER:
        if not quick or (kind, capability) in _QUICK_FIXED_ORDER:
            yield _fixed_order(kind, capability)
    half = "*bf16"
    for max_rank in (16, 64):
        if not quick:
            for rows_ in (16, 32):
                yield from _lora(half, max_rank, rows_, capability)
            yield from _lora(half, max_rank, lora.ROWS, capability, routed=True)
    if not quick:
        yield from _elementwise(half, capability)
    if capability >= 90 and (not quick or capability == 90):
        yield from overlapping(capability, quick)


def overlapping(capability: int, quick: bool = False) -> Iterator[Row]:
    """The kernels of a decode step as they are launched while the one before is finishing."""
    half, model = "*bf16", "gemma-2-27b" if quick else "llama-3-8b"
    variant = f"{model} bf16, overlapping"
    yield from _attention(variant, _HEADS[model], half, capability, None, ("decode",), True)
    yield from _lora(half, 16, 16, capability, overlap=True)
    yield from _elementwise(half, capability, quick, overlap=True)


def _all_rows(capability: int, quick: bool) -> list[Row]:
    return list(rows(capability, quick))


def _attention(
    variant: str,
    heads: Heads,
    half: str,
    capability: int,
    kv: str | None,
    kernels: Sequence[str],
    overlap: bool = False,
) -> Iterator[Row]:
    """overlap: as they overlap with others; then what combines their splits is compiled too."""
    int32, fp32 = "*i32", "*fp32"
    quantized = kv is not None
    shared = {
        "q": half,
        "k_cache": kv or half,
        "v_cache": kv or half,
        "k_scales": fp32 if quantized else half,
        "v_scales": fp32 if quantized else half,
        "sinks": half,
        "query_start": int32,
        "context_lens": int32,
        "block_tables": int32,
        "out": half,
        "seqs": "i32",
        "table_stride": "i32",
        "q_stride": "i32",
        "kv_heads": "i32",
        "scale": "fp32",
        "window": "i32",
    }
    partial = {"partial_out": fp32, "partial_peak": fp32, "partial_total": fp32}
    aligned = ("table_stride", "q_stride")
    variants = {"SOFTCAP": heads.softcap, "HAS_SINKS": heads.sinks, "SEQS_PADDED": 64}
    single = {**variants, "OVERLAP": overlap}
    sizes = heads.group, heads.dim, 16
    short_tokens = attention_decode.short_tokens(heads.group, heads.dim)
    # Of an H100 and a model with 8 KV heads.
    own = attention_prefill.prefill_splitting(heads.group, 8, heads.dim, 132)
    splitting = attention_splits.Splitting(49, short_tokens, *own)
    for kernel, short in (("decode", False), ("decode of few", True)):
        if kernel not in kernels:
            continue
        constants = attention_decode.decode_constants(
            *sizes, capability, quantized=quantized, short=short
        )
        warps, registers = (
            constants.pop("num_warps"),
            attention_decode.max_registers(constants, capability),
        )
        report = compile_kernel(
            attention_decode.decode_kernel,
            shared | partial,
            {**constants, **single, **splitting.constants},
            capability=capability,
            num_warps=warps,
            max_registers=registers,
            aligned=aligned,
        )
        yield Row.of(kernel, variant, capability, report)
    if overlap:
        yield _reduce(variant, heads, half, capability, splitting)
    if "prefill" in kernels:
        constants = attention_prefill.prefill_constants(*sizes, capability, quantized=quantized)
        warps = constants.pop("num_warps")
        report = compile_kernel(
            attention_prefill.prefill_kernel,
            shared | partial,
            {**constants, **variants, **splitting.constants},
            capability=capability,
            num_warps=warps,
            aligned=aligned,
        )
        yield Row.of("prefill", variant, capability, report)
    if "spans" in kernels:
        constants = attention_fixed.fixed_constants(*sizes, capability, quantized=quantized)
        warps = constants.pop("num_warps")
        report = compile_kernel(
            attention_fixed.spans_kernel,
            shared | {"span_out": fp32, "span_peak": fp32, "span_total": fp32},
            {**constants, **variants},
            capability=capability,
            num_warps=warps,
            aligned=aligned,
        )
        yield Row.of("spans", variant, capability, report)


def _reduce(
    variant: str,
    heads: Heads,
    half: str,
    capability: int,
    splitting: attention_splits.Splitting,
) -> Row:
    """What combines the splits of single tokens, as it overlaps with other kernels."""
    types = dict.fromkeys(("query_start", "context_lens"), "*i32") | {"out": half}
    types |= dict.fromkeys(("partial_out", "partial_peak", "partial_total"), "*fp32")
    constants = attention_splits.reduce_constants(heads.dim, splitting)
    warps = constants.pop("num_warps")
    report = compile_kernel(
        attention_splits.reduce_kernel,
        types | dict.fromkeys(("seqs", "q_heads", "window"), "i32"),
        constants | {"SEQS_PADDED": 64, "OVERLAP": True},
        capability=capability,
        num_warps=warps,
    )
    return Row.of("reduce", variant, capability, report)


def _fixed_order(kind: str, capability: int) -> Row:
    """The product of one order, for 4096 inputs and outputs."""
    group, dtype, gated = _FIXED_ORDER[kind]
    dense = group == 0
    order = fixed_order.order_of(4096, 4096, group, 132, dense=dense)
    types = {"x": dtype, "weight": dtype if dense else "*i16", "bias": dtype, "out": dtype}
    constants: dict[str, object] = {"GROUP": group, "SETS": 1 if dense else 128 // group}
    for name, type_ in (("scales", "*fp16"), ("zeros", "*fp16"), ("levels", "*fp32")):
        if dense:
            constants[name] = None
        else:
            types[name] = type_
    numbers = ("rows", "out_features", "columns", "groups", "parts", "steps_each")
    constants |= {
        "DENSE": dense,
        "CODES": "codebook" if "codebook" in kind else "integer",
        "HAS_ZEROS": "zeros" in kind,
        "HAS_BIAS": True,
        "GATED": gated,
        "ACTIVATION": "silu" if gated else None,
        "JOINED": fixed_order.joined(dense, capability, True),
        "WHOLE_STEPS": True,
        "WIDTH": order.width,
        "BLOCK_N": order.block_n,
        "BLOCK_M": order.block_m,
    }
    report = compile_kernel(
        fixed_order.fixed_order_kernel,
        types | {"sums": "*fp32", "arrived": "*i32"} | dict.fromkeys(numbers, "i32"),
        constants,
        capability=capability,
        num_warps=order.num_warps,
        num_stages=order.num_stages,
        max_registers=fixed_order.max_registers(dense, capability, True),
        aligned=("out_features", "columns"),
    )
    return Row.of("fixed order", kind, capability, report)


def _lora(
    half: str,
    max_rank: int,
    rows_: int,
    capability: int,
    routed: bool = False,
    overlap: bool = False,
) -> Iterator[Row]:
    """routed: on experts, whose rows were sorted on the device."""
    found = dict.fromkeys(("order", "starts", "slots"), "*i32")
    found |= {"ends": "*i32"} if routed else {}
    counts = {"segments": "i32", "places": "i32", "plane": "i32"}
    sizes = {
        "PARTS": 2 if routed else 3,
        "MAX_RANK": max_rank,
        "RANK_PADDED": max_rank,
        "SEGMENTS": 16 if routed else 64,
        "ROWS": rows_,
        "OVERLAP": overlap,
    } | ({} if routed else {"ends": None})
    variant = f"rank {max_rank}, {rows_} rows" + ", routed" * routed + ", overlapping" * overlap
    report = compile_kernel(
        lora.shrink_kernel,
        {"x": half, "table": "*i64", **found, "partial": "*fp32"} | counts | {"width": "i32"},
        sizes
        | {"SHARED": 8 if routed else 1, "CHUNK": lora.SHRINK_CHUNK, "TILE": lora.SHRINK_TILE},
        capability=capability,
        aligned=("width",),
    )
    yield Row.of("lora shrink", variant, capability, report)
    strides = ("out_stride", "begin_1", "begin_2", "end")
    report = compile_kernel(
        lora.expand_kernel,
        {"partial": "*fp32", "table": "*i64", "out": half}
        | found
        | counts
        | dict.fromkeys(strides, "i32"),
        sizes | {"CHUNKS": 5, "TILE": lora.EXPAND_TILE},
        capability=capability,
        aligned=strides,
    )
    yield Row.of("lora expand", variant, capability, report)


def _first(kinds: Sequence[Kind], quick: bool) -> Sequence[Kind]:
    return kinds[:1] if quick else kinds


def _elementwise(
    half: str, capability: int, quick: bool = False, overlap: bool = False
) -> Iterator[Row]:
    """quick: the first of each kind."""
    last = ", overlapping" * overlap
    norms: list[tuple[int, int, float | None]] = [(5120, 1, None), (128, 16, None), (5120, 1, 1.0)]
    for width, per_program, offset in _first(norms, quick):
        warps = 16 if per_program == 1 else 4
        report = compile_kernel(
            norm.rms_norm_kernel,
            dict.fromkeys(("x", "residual", "weight", "out", "total"), half)
            | {"rows": "i32", "width": "i32", "heads": "i32", "stride": "i32", "eps": "fp32"},
            {
                "OFFSET": offset,
                "HAS_RESIDUAL": True,
                "ROWS": per_program,
                "WIDTH": 8192 if per_program == 1 else 128,
                "OVERLAP": overlap,
            },
            capability=capability,
            num_warps=warps,
            aligned=("width", "stride"),
        )
        yield Row.of("add_rms_norm", f"width {width}, offset {offset}{last}", capability, report)
    for name in _first(ACTIVATIONS, quick):
        report = compile_kernel(
            activation.gated_kernel,
            {"gate_up": half, "out": half, "width": "i32", "stride": "i32"},
            {"ACTIVATION": name, "TILE": 1024, "OVERLAP": overlap},
            capability=capability,
            aligned=("width", "stride"),
        )
        yield Row.of("gated", name + last, capability, report)
    arrays = dict.fromkeys(("q", "k", "v", "k_cache", "v_cache"), half)
    strides = ("q_stride", "k_stride", "v_stride")
    for dim, rotary_dim, interleaved in _first([(128, 128, False), (256, 128, True)], quick):
        constants = rotary.rotary_constants(dim, rotary_dim)
        report = compile_kernel(
            rotary.rotary_store_kernel,
            arrays
            | dict.fromkeys(("k_scales", "v_scales"), half)
            | {"cos": "*fp32", "sin": "*fp32", "slot_mapping": "*i64"}
            | dict.fromkeys((*strides, "q_heads", "kv_heads"), "i32"),
            constants
            | {"BLOCK_SIZE": 16, "INTERLEAVED": interleaved, "QUANTIZED": False}
            | {"OVERLAP": overlap},
            capability=capability,
            aligned=strides,
        )
        variant = f"head_dim {dim}, {rotary_dim} rotated" + ", interleaved" * interleaved
        yield Row.of("rotary_store", variant + last, capability, report)
    shared = {"logits": "*fp32", "choices": "*fp64", "tokens": "*i64", "least": "*i32"}
    shared |= {"arrived": "*i32", "vocab": "i32", "stride": "i32"}
    draws = dict.fromkeys(("gathered", "counts", "columns"), "*i32")
    draws |= {"sums": "*fp64", "kept": "*fp32"}
    kernels = [
        (sampling.largest_kernel, "the largest", {"peaks": "*fp32", "places": "*i32"}),
        (sampling.draw_kernel, "the draw", draws),
    ]
    for kernel, what, own in _first(kernels, quick):
        report = compile_kernel(
            kernel,
            shared | own,
            sampling.sampling_constants(152_064) | {"OVERLAP": overlap},
            capability=capability,
            num_warps=sampling.WARPS,
            aligned=("vocab", "stride"),
        )
        yield Row.of("sample", what + last, capability, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(COMPILERS) as pool:
        quick = [arguments.quick] * len(arguments.capability)
        found = [row for part in pool.map(_all_rows, arguments.capability, quick) for row in part]
    if arguments.json:
        print(json.dumps([asdict(row) for row in found]))
        return
    columns = list(asdict(found[0]))
    table = [columns, *([str(value) for value in asdict(row).values()] for row in found)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
