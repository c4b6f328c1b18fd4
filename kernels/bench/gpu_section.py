"""What the sections of the GPU benchmark share: options, checks, and results kept as they come.

A section is a script of its own, which gpu.py runs in a process of its own. If a kernel crashes the
device, only the rest of its section is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import torch
import triton
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.triton import timing

BLOCK = 16
# Largest relative error against float64 that rounding explains; the interpreter truncates.
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LLAMA_2_13B: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


@dataclass
class Section:
    """One section's run.

    dry: in Triton's interpreter on the CPU, with tiny sizes.
    deadline: in the time of ``time.monotonic``; nothing new is begun after it.
    out: folder for the results; None keeps them in memory.
    """

    name: str
    device: torch.device
    dry: bool
    deadline: float
    out: Path | None
    failed: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; float16 in the interpreter, which rounds it properly."""
        return torch.float16 if self.dry else torch.bfloat16

    @cached_property
    def read(self) -> float:
        """The copy bandwidth of the device, in bytes per second."""
        found = timing.bandwidth(self.device, 1 if self.dry else 2048)
        print(f"copy: {found / 1e12:.2f} TB/s", flush=True)
        self.keep("copy", found)
        return found

    @cached_property
    def rate(self) -> float:
        """The matrix rate of the device: operations per second of a large bfloat16 product."""
        found = timing.matrix_rate(self.device, 256 if self.dry else 8192)
        print(f"bf16 product: {found / 1e12:.0f} TFLOP/s", flush=True)
        self.keep("bf16", found)
        return found

    def keep(self, name: str, value: object) -> None:
        """Add a result and write all of them, because later parts may crash."""
        self.results[name] = value
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**self.results, "failed": self.failed}, indent=1)
            (self.out / f"{self.name}.json").write_text(text)

    def close(self, name: str, found: Tensor, expected: Tensor, limit: float | None = None) -> None:
        """Check the relative error of ``found`` as a whole against ``limit``; NaN never passes."""
        measured = error(found, expected)
        self.holds(f"{name}: error {measured:.1e}", measured <= (limit or LIMIT[found.dtype]))

    def holds(self, name: str, condition: bool) -> None:
        print(f"  {name} {'ok' if condition else 'WRONG'}", flush=True)
        if not condition:
            self.failed.append(name)

    def attempt(self, name: str, part: Callable[[], object]) -> None:
        """Run a part of the section. If it fails, its name is noted and the next part runs.

        After an error of the device nothing else can run, so that it ends the section.
        """
        try:
            part()
        except Exception as failure:
            print(f"  {name} FAILED: {type(failure).__name__}: {failure}", flush=True)
            self.failed.append(f"{name}: {failure!r}")
            if "CUDA error" in str(failure):
                raise


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def main(name: str, run: Callable[[Section], None], minutes: float) -> int:
    """Parse a section's options, run it, and print what failed. Returns the exit code."""
    parser = argparse.ArgumentParser(description=f"The GPU benchmark's section {name!r}.")
    parser.add_argument("--minutes", type=float, default=minutes, help="begin nothing after these")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, on the CPU")
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        print("no GPU: this measures one (try --dry-run)", file=sys.stderr)
        return 2
    if dry:
        from triton.runtime import interpreter

        from nybble.kernels.bench.interpreted import dot_in_float64

        interpreter.InterpreterBuilder.create_dot = dot_in_float64(interpreter)
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    start = time.monotonic()
    section = Section(name, device, dry, start + 60 * arguments.minutes, arguments.out)
    section.keep("device", "dry run" if dry else torch.cuda.get_device_name())
    section.keep("versions", {"torch": torch.__version__, "triton": triton.__version__})
    torch.manual_seed(time.time_ns())
    with torch.inference_mode():
        run(section)
    section.keep("seconds", round(time.monotonic() - start, 1))
    for failure in section.failed:
        print(f"FAILED {failure}")
    return 1 if section.failed else 0


def paged(
    lengths: list[tuple[int, int]],
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[AttentionBatch, Tensor, Tensor]:
    """A batch over scattered blocks of random keys and values.

    lengths: for each sequence its context length and how many of those tokens are new.

    Returns the batch, and the keys and values [blocks, kv_heads, BLOCK, dim].
    """
    counts = [-(-context // BLOCK) for context, _ in lengths]
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    for row, blocks in enumerate(torch.split(torch.randperm(sum(counts)), counts)):
        tables[row, : len(blocks)] = blocks
    new = [count for _, count in lengths]
    batch = AttentionBatch(
        query_start=torch.tensor([0, *new]).cumsum(0).int().to(device),
        context_lens=torch.tensor([c for c, _ in lengths], dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slot_mapping=torch.full((sum(new),), -1, device=device),
        max_query=max(new),
        rows=tuple(new),
    )
    shape = (sum(counts), kv_heads, BLOCK, dim)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    return batch, keys, values


def in_8_bits(keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random 8-bit keys and values of the shape of ``keys``, and the scales of each.

    dtype: int8 or float8_e4m3fn.
    """
    codes = [torch.randint(-127, 128, keys.shape, device=keys.device).to(dtype) for _ in range(2)]
    scales = [torch.rand(keys.shape[:3], device=keys.device) / 60 for _ in range(2)]
    return codes[0], codes[1], scales[0], scales[1]


def kv_dtypes(section: Section) -> list[torch.dtype]:
    """The 8-bit KV cache dtypes which the device supports; e4m3 needs Ada (sm_89) or newer."""
    ada = section.dry or torch.cuda.get_device_capability() >= (8, 9)
    return [torch.int8, torch.float8_e4m3fn] if ada else [torch.int8]
