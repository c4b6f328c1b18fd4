"""What the assembler makes of the kernels of latent attention: registers, memory, tensor cores.

    python -m nybble.kernels.bench.latent_report [--quick] [--json]

Needs no GPU. The sizes are those of DeepSeek-V2-Lite and V3 and of GLM-4.7-Flash.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from nybble.kernels.bench import cubin
from nybble.kernels.bench.step_report import Row
from nybble.kernels.triton import attention_latent, attention_splits, latent, rotary

CAPABILITIES = (80, 89, 90, 100, 120)
_HEADS = {"v2-lite": 16, "glm-4.7-flash": 20, "v3": 128}
_ROTATED, _LATENT, _BLOCK = 64, 512, 16
_SPLITTING = attention_splits.Splitting(64, attention_splits.SHORT)
_KERNELS = ("latent decode", "latent prefill", "latent store", "latent reduce")

# What --quick compiles: of a kernel on a GPU the case with this number.
_QUICK = {
    ("latent prefill", 80): 0,
    ("latent decode", 90): 3,
    ("latent store", 90): 0,
}


@dataclass(frozen=True)
class Case:
    """One compilation. kept: the dtype of a cache of 8 bits; e4m3 needs sm_89."""

    kernel: str
    model: str
    capability: int
    dtype: str
    kept: str | None


def cases(quick: bool) -> Iterator[Case]:
    """quick: few of each kind."""
    for capability in CAPABILITIES:
        caches = [("bf16", None), ("fp16", None), ("bf16", "i8")]
        caches += [("bf16", "fp8e4nv")] if capability >= 89 else []
        for kernel in _KERNELS:
            # The store has no size of a model in it, nor has the sum of the parts a cache.
            models = list(_HEADS) if kernel in _KERNELS[:2] else ["v3"]
            kinds = caches[:1] if kernel == "latent reduce" else caches
            every = [Case(kernel, m, capability, *kind) for m in models for kind in kinds]
            if not quick:
                yield from every
            elif (kernel, capability) in _QUICK:
                yield every[_QUICK[kernel, capability]]


def row(case: Case) -> Row:
    """Compile a case and count its instructions."""
    half, heads = "*" + case.dtype, _HEADS[case.model]
    cache = "*" + (case.kept or case.dtype)
    scales = cache if case.kept is None else "*fp32"
    parts = dict.fromkeys(("partial_out", "partial_peak", "partial_total"), "*fp32")
    batch = dict.fromkeys(("query_start", "context_lens"), "*i32")
    constants: dict[str, object] = {}
    registers: int | None = None
    strides: tuple[str, ...]
    if case.kernel == "latent store":
        kernel = latent.latent_store_kernel
        types = dict.fromkeys(("q", "key", "latents"), half) | {"cos": "*fp32", "sin": "*fp32"}
        types |= {"cache": cache, "scales": scales, "slot_mapping": "*i64", "heads": "i32"}
        strides = ("q_stride", "head_stride", "key_stride", "latent_stride")
        types |= dict.fromkeys(strides, "i32")
        constants |= rotary.rotary_constants(_ROTATED + _LATENT, _ROTATED)
        constants |= {"INTERLEAVED": True, "QUANTIZED": case.kept is not None}
    elif case.kernel == "latent reduce":
        kernel, strides = attention_splits.reduce_kernel, ()
        types = batch | {"out": half} | parts
        types |= dict.fromkeys(("seqs", "q_heads", "window"), "i32")
        constants |= attention_splits.reduce_constants(_LATENT, _SPLITTING) | {"SEQS_PADDED": 64}
        constants |= {"OVERLAP": False}
    else:
        decode = case.kernel == "latent decode"
        kernel = (
            attention_latent.latent_decode_kernel
            if decode
            else attention_latent.latent_prefill_kernel
        )
        strides = ("table_stride",)
        types = {"q": half, "cache": cache, "values": cache, "scales": scales} | batch
        types |= {"block_tables": "*i32", "out": half} | (parts if decode else {})
        types |= {"seqs": "i32", "table_stride": "i32", "heads": "i32", "scale": "fp32"}
        sizes = heads, _ROTATED, _LATENT, _BLOCK, case.capability
        kinds = {"quantized": case.kept is not None, "decode": decode}
        constants |= attention_latent.latent_constants(*sizes, **kinds) | {"SEQS_PADDED": 64}
        registers = attention_latent.DECODE_REGISTERS if decode else None
        constants |= _SPLITTING.constants if decode else {"SHORT": attention_splits.SHORT}
    warps = constants.pop("num_warps", 4)
    assert isinstance(warps, int)
    report = cubin.compile_kernel(
        kernel,
        types,
        constants,
        capability=case.capability,
        num_warps=warps,
        max_registers=registers,
        aligned=strides,
    )
    variant = f"{case.model} {case.dtype}" + (f", {case.kept} KV" if case.kept else "")
    return Row.of(case.kernel, variant, case.capability, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few of each kind")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(cubin.COMPILERS) as pool:
        for found in pool.map(row, cases(arguments.quick)):
            print(json.dumps(asdict(found)) if arguments.json else found, flush=True)


if __name__ == "__main__":
    main()
