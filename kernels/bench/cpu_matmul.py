"""4-bit matmul on the CPU beside its peers, all alternating in one run.

    python kernels/bench/cpu_matmul.py [--targets amx,avx512_bf16]

`--targets` are instruction sets of the kernels, as NYBBLE_CPU_TARGET names them (default: the
fastest that this CPU has, and the slowest). Columns are milliseconds (median). `floor` is the
larger of two times: that of reading the bytes of the packed weight at the read bandwidth, and that
of the multiplications at PyTorch's dense bf16 rate. Both rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from nybble.kernels import PackedWeight
from nybble.kernels.cpu.build import build, usable_targets, wanted_targets
from nybble.kernels.cpu.library import CpuLibrary
from nybble.kernels.packed import SYMMETRIC_LEVELS

SHAPES = ((896, 9728), (4864, 896), (4096, 4096), (4096, 11008))  # (in, out)
ROWS = (1, 4, 8, 32, 128, 512)
GROUP = 128


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, by name; the calls alternate."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def packed(
    columns: int, out: int, group: int, scale: torch.dtype, levels: torch.Tensor = SYMMETRIC_LEVELS
) -> PackedWeight:
    return PackedWeight(
        qweight=torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8),
        scales=torch.rand(out, columns // group).to(scale),
        zeros=None,
        levels=levels,
        out_features=out,
        in_features=columns,
        group_size=group,
    ).to_layout("cpu_tiles")


def bandwidth() -> float:
    """The read bandwidth in bytes per second: a sum over 512 MiB."""
    data = torch.ones(1 << 26, dtype=torch.int64)
    return data.nbytes / (medians({"sum": data.sum}, 5)["sum"] / 1e3)


def dense_rate() -> float:
    """Multiply-adds per second of a large dense bf16 product."""
    a, b = torch.randn(512, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
    took = medians({"mm": lambda: torch.nn.functional.linear(a, b)}, 5)["mm"] / 1e3
    return 512 * 4096 * 4096 / took


def contenders(
    columns: int, out: int, x: torch.Tensor, libraries: dict[str, CpuLibrary]
) -> dict[str, Callable[[], object]]:
    """One call per kernel, each on weights of its own."""
    affine = packed(columns, out, GROUP, torch.float16)
    codebook = packed(columns, out, 64, torch.float32, torch.linspace(-1, 1, 16))
    dense = torch.randn(out, columns).bfloat16()
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (out, columns), dtype=torch.int32), 1
    )
    scales = torch.rand(columns // GROUP, out, 2).bfloat16()
    ours = {
        f"{name} {target}": partial(library.packed_matmul, x, weight)
        for name, weight in (("affine", affine), ("codebook", codebook))
        for target, library in libraries.items()
    }
    return {
        **ours,
        "aten int4": lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, int4, GROUP, scales),
        "dense bf16": lambda: torch.nn.functional.linear(x, dense),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    usable = usable_targets()
    default = ",".join(dict.fromkeys((usable[0].name, usable[-1].name)))
    parser.add_argument("--targets", default=default)
    targets = [wanted_targets(name)[0] for name in parser.parse_args().targets.split(",")]
    libraries = {target.name: CpuLibrary(ctypes.CDLL(str(build(target)))) for target in targets}
    read, rate = bandwidth(), dense_rate()
    print(
        f"read bandwidth {read / 1e9:.1f} GB/s, dense bf16 {rate / 1e9:.0f} GMAC/s, "
        f"{torch.get_num_threads()} threads"
    )
    heading = False
    for columns, out in SHAPES:
        for rows in ROWS:
            x = torch.randn(rows, columns).bfloat16()
            calls = contenders(columns, out, x, libraries)
            if not heading:
                print(
                    f"{'in':>6}{'out':>7}{'M':>5}", *(f"{name:>20}" for name in (*calls, "floor"))
                )
                heading = True
            times = medians(calls, 15 if rows <= 32 else 4)
            weight_bytes = columns * out * (4 + 16 / GROUP) / 8
            times["floor"] = max(weight_bytes / read, rows * columns * out / rate) * 1e3
            print(f"{columns:>6}{out:>7}{rows:>5}", *(f"{ms:>20.2f}" for ms in times.values()))


if __name__ == "__main__":
    main()
