"""The 4-bit matmul on a GPU: checked against float64, then timed against its peers, in one run.

    python kernels/bench/gpu_matmul.py [--minutes 5] [--out DIR] [--dry-run]

Checks come first and a failed one ends the run with exit code 1. The table's columns are
microseconds (median of CUDA graph replays, on weights rotated so that the L2 cache does not
flatter). `overlap` is `affine g128` launched while the product before is finishing. `floor` is the
larger of the packed bytes over the copy bandwidth and the operations over the bf16 matrix rate,
both measured in the same run; `%` is floor over `affine g128`. `err` is the largest relative error
of our columns against float64, on the data that was timed. A peer that is not installed shows –.
`--dry-run` takes tiny sizes through Triton's interpreter on the CPU: every line of this file but
no meaningful time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import torch
import triton
from nybble.kernels import PackedWeight
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles
from nybble.kernels.triton import matmul, timing
from nybble.kernels.triton.configs import Config
from torch import Tensor

NF4 = torch.tensor(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
SHAPES = (  # (in, out), most telling first
    ("Llama-2-7B o", 4096, 4096),
    ("Llama-2-7B gate_up", 4096, 22016),
    ("Llama-2-13B o", 5120, 5120),
    ("Llama-2-13B down", 13824, 5120),
    ("Llama-3-8B qkv", 4096, 6144),
    ("Llama-2-70B down", 28672, 8192),
    ("Qwen2.5-0.5B down", 4864, 896),
    ("Llama-2-7B down", 11008, 4096),
    ("Llama-2-7B qkv", 4096, 12288),
    ("Llama-2-13B qkv", 5120, 15360),
    ("Llama-2-13B gate_up", 5120, 27648),
    ("Llama-3-8B gate_up", 4096, 28672),
    ("Llama-3-8B down", 14336, 4096),
    ("Qwen2.5-7B gate_up", 3584, 37888),
    ("Qwen2.5-7B down", 18944, 3584),
    ("Qwen2.5-0.5B gate_up", 896, 9728),
    ("Llama-2-70B qkv", 8192, 10240),
    ("Llama-2-70B gate_up", 8192, 57344),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
OURS = ("affine g128", "affine g32", "nf4 g64")
# Largest relative error against float64 that rounding explains.
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


def random_weight(
    kind: str, columns: int, out: int, group: int, device: torch.device, extras: bool = False
) -> PackedWeight:
    """``kind``: symmetric, zeros or nf4, made on ``device``; ``extras`` adds bias and act-order."""
    groups = -(-columns // group)
    codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8, device=device)
    zeros = torch.randint(0, 16, (out, groups), device=device).half() if kind == "zeros" else None
    levels = {"symmetric": SYMMETRIC_LEVELS, "zeros": INTEGER_LEVELS, "nf4": NF4}[kind]
    return PackedWeight(
        qweight=pack_nibbles(codes),
        scales=(torch.rand(out, groups, device=device) / 64 + 0.004).half(),
        zeros=zeros,
        levels=levels.to(device),
        out_features=out,
        in_features=columns,
        group_size=group,
        perm=torch.randperm(columns, device=device).int() if extras else None,
        bias=torch.randn(out, device=device).half() if extras else None,
    ).to_layout("gpu_tiles")


def relative_error(x: Tensor, weight: PackedWeight, found: Tensor) -> float:
    """Against float64, a few rows from either end where there are many."""
    ends = torch.unique(torch.tensor([*range(32), *range(-32, 0)]) % len(x)).to(x.device)
    expected = x[ends].double() @ weight.dequantize().double().T
    if weight.bias is not None:
        expected += weight.bias.double()
    return float((found[ends].double() - expected).norm() / expected.norm())


def poisoned(x: Tensor, weight: PackedWeight, config: Config | None = None) -> Tensor:
    """The product written over memory that held NaN, so that an unwritten element shows."""
    bad = torch.full((len(x), weight.out_features), float("nan"), dtype=x.dtype, device=x.device)
    del bad  # the allocator hands the same block to the next tensor of this size
    return matmul.packed_matmul(x, weight, config)


def checks(device: torch.device, dry: bool) -> list[str]:
    """Every format and bucket on odd sizes; what failed."""
    failed = []
    columns, out = (200, 72) if dry else (1160, 2120)
    for dtype in (torch.float16, torch.bfloat16):
        rows_of = [17] if dry else [1, 13, 250]
        if dtype == torch.bfloat16:
            rows_of += [3] if dry else [3, 7, 29, 61, 127, 1000, 4100]
        for kind, group in (("symmetric", 128), ("zeros", 32), ("nf4", 64), ("zeros", columns)):
            worst, where = 0.0, 0
            for rows in rows_of:
                weight = random_weight(kind, columns, out, group, device, extras=True)
                x = torch.randn(rows, columns, device=device).to(dtype)
                once = poisoned(x, weight)
                if not torch.equal(once, poisoned(x, weight)):
                    failed.append(f"{kind} g{group} {dtype} m{rows}: two runs differ")
                error = relative_error(x, weight, once)
                if not error <= worst:
                    worst, where = error, rows
            limit = LIMIT[dtype] * (2 if dry else 1)  # the interpreter truncates to bfloat16
            verdict = "ok" if worst <= limit else "WRONG"
            print(f"  {kind:>9} g{group:<5}{str(dtype)[6:]:>9}: error {worst:.1e} {verdict}")
            if not worst <= limit:
                failed.append(f"{kind} g{group} {dtype}: error {worst:.1e} at {where} rows")
    return failed


def copies(nbytes: int, total: int) -> int:
    """How many weights of ``nbytes`` together outgrow the cache."""
    return min(24, max(2, -(-total // nbytes)))


class Peers:
    """One shape's contenders: for each name, calls on rotated copies of a weight."""

    def __init__(self, columns: int, out: int, device: torch.device, total: int) -> None:
        count = copies(columns * out // 2, total)
        self.ours = {
            name: [random_weight(kind, columns, out, group, device) for _ in range(count)]
            for name, kind, group in zip(
                OURS, ("symmetric", "zeros", "nf4"), (128, 32, 64), strict=True
            )
        }
        dense = range(copies(2 * columns * out, total))
        self.dense = [torch.randn(out, columns, device=device).bfloat16() for _ in dense]
        self.tinygemm = list(_tinygemm_weights(columns, out, device, count))
        self.bitsandbytes = list(_bitsandbytes_weights(self.dense))
        self.gemlite = list(_gemlite_layers(columns, out, device, count))

    def calls(self, x: Tensor) -> Iterator[tuple[str, list[timing.Call]]]:
        """Name and calls of each contender on ``x``."""
        for name, weights in self.ours.items():
            yield name, [partial(matmul.packed_matmul, x, w) for w in weights]
        yield "overlap", [partial(overlapped, x, w) for w in self.ours["affine g128"]]
        yield "cublas", [partial(torch.nn.functional.linear, x, w) for w in self.dense]
        if self.tinygemm:
            mm = torch.ops.aten._weight_int4pack_mm
            yield "tinygemm", [partial(mm, x, w, 128, scales) for w, scales in self.tinygemm]
        if self.bitsandbytes:
            import bitsandbytes as bnb

            nf4 = bnb.matmul_4bit  # type: ignore[attr-defined]
            yield "bnb nf4", [partial(nf4, x, w.t(), state) for w, state in self.bitsandbytes]
        if self.gemlite:
            yield "gemlite", [partial(layer, x) for layer in self.gemlite]


def overlapped(x: Tensor, weight: PackedWeight) -> Tensor:
    """Our product, launched while the one before it is finishing."""
    config = replace(matmul.chosen(weight, len(x), x.device), overlap=True)
    return matmul.packed_matmul(x, weight, config)


def _tinygemm_weights(
    columns: int, out: int, device: torch.device, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """PyTorch's own int4 kernel, where this build and shape have it."""
    if device.type != "cuda" or columns % 128 or out % 8:
        return
    for _ in range(count):
        codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        yield packed, torch.rand(columns // 128, out, 2, device=device).bfloat16()


def _bitsandbytes_weights(dense: list[Tensor]) -> Iterator[tuple[Tensor, Any]]:
    """bitsandbytes' NF4, where it is installed."""
    if not dense[0].is_cuda:
        return
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return
    for weight in dense[:4]:
        yield bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")


def _gemlite_layers(columns: int, out: int, device: torch.device, count: int) -> Iterator[Any]:
    """gemlite's 4-bit layers in groups of 128, where it is installed."""
    if device.type != "cuda":
        return
    try:
        from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]
    except ImportError:
        return
    for _ in range(count):
        layer = GemLiteLinear(
            4,
            group_size=128,
            in_features=columns,
            out_features=out,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8, device=device)
        scales = torch.rand(out, columns // 128, device=device).bfloat16()
        layer.pack(codes, scales, torch.full_like(scales, 8), None)
        yield layer


def table(
    device: torch.device, deadline: float, read: float, rate: float, dry: bool
) -> list[dict[str, object]]:
    """Time every shape and number of rows until ``deadline`` (of ``time.monotonic``)."""
    shapes = (("tiny", 256, 64), ("odd", 200, 72)) if dry else SHAPES
    rows_of = (1, 20) if dry else ROWS
    total = 1 if dry else 200 << 20  # four times the L2 cache of an H100
    names = (*OURS, "overlap", "cublas", "tinygemm", "bnb nf4", "gemlite")
    results: list[dict[str, object]] = []
    for label, columns, out in shapes:
        if time.monotonic() > deadline:
            print(f"out of time: {label} and later shapes were not measured")
            break
        peers = Peers(columns, out, device, total)
        print(f"{label}, {columns} → {out}  (µs)")
        print(f"{'M':>6}", *(f"{n:>12}" for n in (*names, "floor")), f"{'%':>5}{'err':>9}")
        for rows in rows_of:
            if time.monotonic() > deadline:
                break
            x = torch.randn(rows, columns, device=device).bfloat16()
            errors = [
                relative_error(x, weights[0], poisoned(x, weights[0]))
                for weights in peers.ours.values()
            ]
            first = peers.ours["affine g128"][0]
            for _ in range(
                2 if dry else 8
            ):  # back to back, each beginning while the one before ends
                again = overlapped(x, first)
            if not torch.equal(again, matmul.packed_matmul(x, first)):
                print("  WRONG: the overlapped launch (off by default) gave another result")
            taken: dict[str, float] = {}
            for name, calls in peers.calls(x):
                few = calls[:2] if rows > 512 or dry else calls
                try:
                    taken[name] = 1e3 * timing.milliseconds(few, 5 if rows > 512 else 9)
                except Exception as error:
                    if name in OURS:
                        raise
                    print(f"  {name} did not run: {type(error).__name__}: {error}")
            moved = peers.ours["affine g128"][0].nbytes + 2 * rows * (columns + out)
            floor = 1e6 * max(moved / read, 2 * rows * columns * out / rate)
            worst = max(errors, key=lambda e: (e != e, e))  # NaN above all
            cells = (f"{taken[n]:>12.1f}" if n in taken else f"{'–':>12}" for n in names)
            share = 100 * floor / taken["affine g128"]
            print(f"{rows:>6}", *cells, f"{floor:>12.1f}{share:>6.0f}{worst:>9.1e}", flush=True)
            entry = {"in": columns, "out": out, "rows": rows, "floor": floor, "error": worst}
            results.append({"shape": label, **entry, **taken})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="stop starting rows after this")
    parser.add_argument("--out", type=Path, help="folder for results as JSON")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes, interpreted, on the CPU"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        print("no GPU: this measures one (try --dry-run)", file=sys.stderr)
        return 2
    device = torch.device("cpu" if dry else "cuda")
    name = "dry run" if dry else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    torch.manual_seed(time.time_ns())

    print("checks, on odd sizes with bias and act-order:", flush=True)
    failed = checks(device, dry)
    for failure in failed:
        print(f"FAILED {failure}")
    read = timing.bandwidth(device, 1 if dry else 2048)
    rate = timing.matrix_rate(device, 256 if dry else 8192)
    print(
        f"checks took {time.monotonic() - start:.0f} s; copy {read / 1e12:.2f} TB/s, "
        f"bf16 {rate / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    results = table(device, start + 60 * arguments.minutes, read, rate, dry)
    wrong = [r for r in results if not float(str(r["error"])) <= 2 * LIMIT[torch.bfloat16]]
    for result in wrong:
        print(f"FAILED {result['shape']} m{result['rows']}: error {result['error']}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = {"device": name, "copy": read, "bf16": rate, "failed": failed, "rows": results}
        (arguments.out / "gpu_matmul.json").write_text(json.dumps(report, indent=1))
    print(f"took {time.monotonic() - start:.0f} s")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
