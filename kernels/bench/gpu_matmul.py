"""The 4-bit matmul on a GPU: timed beside its peers and its floor, with each result checked.

The table's columns are microseconds (median of CUDA graph replays). The weights rotate, so that
they do not come from the L2 cache.

- `overlap`: `affine g128`, launched while the previous product is finishing.
- `silu·mul`: the activation of a gated weight is part of the product.
- `uncut`: `affine g128` with whole blocks, where the configuration has two unequal parts of each.
- `floor`: the larger of two times, that of the packed bytes at the copy bandwidth and that of the
  operations at the bf16 matrix rate. Both rates are measured in the same run.
- `%`: `floor` as a share of `affine g128`.
- `err`: the largest relative error of our columns against float64, on the data that was timed.

A peer that is not installed, or fails, shows –.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from nybble.kernels.bench import gpu_section
from nybble.kernels.bench.gpu_section import Section

# isort: split
import torch
from torch import Tensor

from nybble.kernels import PackedWeight
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS, pack_nibbles
from nybble.kernels.triton import activation, matmul, timing
from nybble.kernels.triton.configs import Config

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
SHAPES = (  # (in, out), the most informative first: the later ones may not be reached in time
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
    """A random weight [out, columns] in GPU tiles. kind: "symmetric", "zeros" or "nf4".

    extras: with a bias and act-order.
    """
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
    """Relative error of ``found`` against float64, of its first and last 32 rows."""
    ends = torch.unique(torch.tensor([*range(32), *range(-32, 0)]) % len(x)).to(x.device)
    expected = x[ends].double() @ weight.dequantize().double().T
    if weight.bias is not None:
        expected += weight.bias.double()
    return float((found[ends].double() - expected).norm() / expected.norm())


def poisoned(x: Tensor, weight: PackedWeight, config: Config | None = None) -> Tensor:
    """The product, written into memory that held NaN: an element that is not written stays NaN."""
    bad = torch.full((len(x), weight.out_features), float("nan"), dtype=x.dtype, device=x.device)
    del bad  # the allocator gives this block to the next tensor of the same size, the output
    return matmul.packed_matmul(x, weight, config)


def random_packed(inputs: int, outputs: int, device: torch.device) -> PackedWeight:
    """Random symmetric 4-bit codes in groups of 128, scaled to the variance of a trained layer."""
    groups = -(-inputs // 128)
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = torch.rand(outputs, groups, device=device) * 0.1 + 0.17
    return PackedWeight(
        qweight=codes,
        scales=(scales * inputs**-0.5).half(),
        zeros=None,
        levels=SYMMETRIC_LEVELS.to(device),
        out_features=outputs,
        in_features=inputs,
        group_size=128,
    )


def check_matmul(section: Section) -> None:
    """Every format and bucket on odd sizes, with bias and act-order."""
    device, dry = section.device, section.dry
    columns, out = (200, 80) if dry else (1160, 2128)
    for dtype in (torch.float16, torch.bfloat16):
        rows_of = [17] if dry else [1, 13, 250]
        if dtype == torch.bfloat16:
            rows_of += [3] if dry else [3, 7, 29, 61, 127, 1000, 4100]
        limit = LIMIT[dtype] * (2 if dry else 1)  # the interpreter truncates to bfloat16
        for kind, group in (("symmetric", 128), ("zeros", 32), ("nf4", 64), ("zeros", columns)):
            worst = 0.0
            for rows in rows_of:
                weight = random_weight(kind, columns, out, group, device, extras=True)
                x = torch.randn(rows, columns, device=device).to(dtype)
                once = poisoned(x, weight)
                name = f"{kind} g{group} {str(dtype)[6:]} m{rows}"
                if not torch.equal(once, poisoned(x, weight)):
                    section.holds(f"{name}: twice the same", False)
                gated = weight.to_layout("gpu_gated_tiles")
                fused = matmul.packed_matmul(x, gated, activation="silu")
                if not torch.equal(fused, activation.gated(once, "silu")):
                    section.holds(f"{name}: SiLU·mul in the product as after it", False)
                found = relative_error(x, weight, once)
                if not found <= limit:
                    section.holds(f"{name}: error {found:.1e}", False)
                worst = max(worst, found)
            print(f"  {kind:>9} g{group:<5}{str(dtype)[6:]:>9}: error {worst:.1e}", flush=True)
    check_unequal_parts(section)


def check_unequal_parts(section: Section) -> None:
    """Blocks in two parts, where the last one to finish adds what the other left."""
    device, dry = section.device, section.dry
    columns, out, rows = (200, 80, 17) if dry else (13824, 5120, 250)
    config = Config(128, 128, 2, 8, 3, scale_first=True, lead=0.7)
    weight = random_weight("symmetric", columns, out, 128, device, extras=True)
    x = torch.randn(rows, columns, device=device).bfloat16()
    once = poisoned(x, weight, config)
    # Whichever part is the first to be done, the sum is the same.
    for _ in range(2 if dry else 20):
        if not torch.equal(once, poisoned(x, weight, config)):
            section.holds("unequal parts: always the same", False)
    found = relative_error(x, weight, once)
    if not found <= LIMIT[torch.bfloat16] * (2 if dry else 1):
        section.holds(f"unequal parts: error {found:.1e}", False)
    print(f"  unequal parts, m{rows}: error {found:.1e}", flush=True)


def copies(nbytes: int, total: int) -> int:
    """How many weights of ``nbytes`` to rotate so that they exceed ``total``, the cache's bytes."""
    return min(24, max(2, -(-total // nbytes)))


class Peers:
    """The kernels compared at one shape: for each name, calls on rotating copies of a weight."""

    def __init__(self, columns: int, out: int, device: torch.device, total: int) -> None:
        count = copies(columns * out // 2, total)
        self.ours = {
            name: [random_weight(kind, columns, out, group, device) for _ in range(count)]
            for name, kind, group in zip(
                OURS, ("symmetric", "zeros", "nf4"), (128, 32, 64), strict=True
            )
        }
        halves = out % 16 == 0
        self.gated = [w.to_layout("gpu_gated_tiles") for w in self.ours[OURS[0]] if halves]
        dense = range(copies(2 * columns * out, total))
        self.dense = [torch.randn(out, columns, device=device).bfloat16() for _ in dense]
        self.tinygemm = optional(_tinygemm_weights(columns, out, device, count))
        self.bitsandbytes = optional(_bitsandbytes_weights(self.dense))
        self.gemlite = optional(_gemlite_layers(columns, out, device, count))

    def calls(self, x: Tensor) -> Iterator[tuple[str, list[timing.Call]]]:
        """Name and calls of each kernel on ``x``."""
        for name, weights in self.ours.items():
            yield name, [partial(matmul.packed_matmul, x, w) for w in weights]
        yield "overlap", [partial(overlapped, x, w) for w in self.ours["affine g128"]]
        config = matmul.chosen(self.ours["affine g128"][0], len(x), x.device)
        if config.lead:
            uncut = replace(config, splits=1, tail=0, lead=0.0)
            whole = partial(matmul.packed_matmul, config=uncut)
            yield "uncut", [partial(whole, x, w) for w in self.ours["affine g128"]]
        if self.gated:
            fused = partial(matmul.packed_matmul, activation="silu")
            yield "silu·mul", [partial(fused, x, w) for w in self.gated]
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


def optional(weights: Iterator[Any]) -> list[Any]:
    """A peer's weights; none if it fails to make them for any reason, which is printed."""
    try:
        return list(weights)
    except Exception as failure:
        print(f"  a peer is left out: {type(failure).__name__}: {failure}")
        return []


def overlapped(x: Tensor, weight: PackedWeight) -> Tensor:
    """Our product, launched while the previous one is finishing."""
    config = replace(matmul.chosen(weight, len(x), x.device), overlap=True)
    return matmul.packed_matmul(x, weight, config)


def _tinygemm_weights(
    columns: int, out: int, device: torch.device, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """PyTorch's own int4 kernel, if this build and shape have it."""
    if device.type != "cuda" or columns % 128 or out % 8:
        return
    for _ in range(count):
        codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        yield packed, torch.rand(columns // 128, out, 2, device=device).bfloat16()


def _bitsandbytes_weights(dense: list[Tensor]) -> Iterator[tuple[Tensor, Any]]:
    """bitsandbytes' NF4, if it is installed."""
    if not dense[0].is_cuda:
        return
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return
    for weight in dense[:4]:
        yield bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")


def _gemlite_layers(columns: int, out: int, device: torch.device, count: int) -> Iterator[Any]:
    """gemlite's 4-bit layers in groups of 128, if it is installed."""
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


def run(section: Section) -> None:
    """Time every shape and number of rows while there is time."""
    dry = section.dry
    results: list[dict[str, object]] = []
    for label, columns, out in (("tiny", 256, 64), ("odd", 200, 80)) if dry else SHAPES:
        if section.out_of_time:
            print(f"out of time: {label} and later shapes were not measured")
            break
        section.attempt(label, partial(time_shape, section, label, columns, out, results))


def time_shape(
    section: Section, label: str, columns: int, out: int, results: list[dict[str, object]]
) -> None:
    dry, device = section.dry, section.device
    read, rate = section.read, section.rate
    names = (*OURS, "overlap", "uncut", "silu·mul", "cublas", "tinygemm", "bnb nf4", "gemlite")
    # Four times the L2 cache of an H100.
    peers = Peers(columns, out, device, 1 if dry else 200 << 20)
    print(f"{label}, {columns} → {out}  (µs)")
    print(f"{'M':>6}", *(f"{n:>12}" for n in (*names, "floor")), f"{'%':>5}{'err':>9}")
    first = peers.ours["affine g128"][0]
    for rows in (1, 20) if dry else ROWS:
        if section.out_of_time:
            break
        x = torch.randn(rows, columns, device=device).bfloat16()
        errors = [
            relative_error(x, weights[0], poisoned(x, weights[0]))
            for weights in peers.ours.values()
        ]
        for _ in range(2 if dry else 8):  # back to back: each starts while the previous one ends
            again = overlapped(x, first)
        if not torch.equal(again, matmul.packed_matmul(x, first)):
            section.holds(f"{label} m{rows}: an overlapped launch (off by default)", False)
        taken: dict[str, float] = {}
        for name, calls in peers.calls(x):
            few = calls[:2] if rows > 512 or dry else calls
            try:
                taken[name] = 1e3 * timing.milliseconds(few, 5 if rows > 512 else 9)
            except Exception as failure:
                if name in OURS or "CUDA error" in str(failure):
                    raise
                print(f"  {name} did not run: {type(failure).__name__}: {failure}")
        moved = first.nbytes + 2 * rows * (columns + out)
        floor = 1e6 * max(moved / read, 2 * rows * columns * out / rate)
        worst = max(errors, key=lambda e: (e != e, e))  # NaN above all
        cells = (f"{taken[n]:>12.1f}" if n in taken else f"{'–':>12}" for n in names)
        share = 100 * floor / taken["affine g128"]
        print(f"{rows:>6}", *cells, f"{floor:>12.1f}{share:>6.0f}{worst:>9.1e}", flush=True)
        if not worst <= 2 * LIMIT[torch.bfloat16]:
            section.holds(f"{label} m{rows}: error {worst:.1e}", False)
        entry = {"in": columns, "out": out, "rows": rows, "floor": floor, "error": worst}
        results.append({"shape": label, **entry, **taken})
        section.keep("rows", results)


if __name__ == "__main__":
    sys.exit(gpu_section.main("matmul", run, minutes=6))
