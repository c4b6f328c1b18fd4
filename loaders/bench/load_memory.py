"""Memory that loading a checkpoint takes beyond what it holds in the end.

    python loaders/bench/load_memory.py MODEL [...]
    python loaders/bench/load_memory.py --sample FOLDER

A model is a folder or a GGUF file. ``--sample`` writes a random model in every format, and measures
those. Each is loaded in a process of its own, as the engine does on a CPU:
one weight at a time, laid out for the kernels.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.matmul import preferred_layout
from nybble.loaders import open_checkpoint, resolve_model
from nybble.loaders.bench.read_only import write_gpt_oss, write_read_only
from nybble.loaders.formats import written_formats
from nybble.quantizers import quantize_checkpoint

_MIB = 1 << 20


def _memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since it began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def load(model: str) -> str:
    """One row: the format, MiB held, and the peak above them in MiB."""
    checkpoint = open_checkpoint(resolve_model(model))
    layout, held, total = preferred_layout(torch.device("cpu")), [], 0
    before = _memory("VmRSS")
    for _, weight in checkpoint.weights():
        if isinstance(weight, PackedWeight):
            weight = weight.to_layout(layout)
            total += weight.nbytes
        elif isinstance(weight, DenseWeight):
            weight = DenseWeight(weight.weight.bfloat16(), weight.bias)
            total += weight.weight.nbytes
        else:
            weight = weight.bfloat16()
            total += weight.nbytes
        held.append(_own(weight))
    above = _memory("VmHWM") - before - total
    return f"| {checkpoint.format} | {total / _MIB:.0f} | {above / _MIB:.0f} |"


def _own(weight: PackedWeight | DenseWeight | Tensor) -> PackedWeight | DenseWeight | Tensor:
    """A 16-bit weight that is mapped from its file is copied, so that it is counted once."""
    if isinstance(weight, Tensor):
        return weight.clone()
    return DenseWeight(weight.weight.clone()) if isinstance(weight, DenseWeight) else weight


def sample(folder: Path) -> list[str]:
    """A random model in 16 bits and in every format."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    plain = folder / "16-bit"
    if not plain.is_dir():
        LlamaForCausalLM(config).bfloat16().save_pretrained(plain)
    for name in written_formats():
        if not (folder / name).is_dir():
            quantize_checkpoint(plain, folder / name, format=name, progress=False)
    if not (wide := folder / "gptq-8-bit").is_dir():
        quantize_checkpoint(plain, wide, format="gptq", bits=8, progress=False)
    written = [plain, *(folder / name for name in written_formats()), wide]
    others = [*write_read_only(plain, folder / "gptq", folder), write_gpt_oss(folder)]
    return list(map(str, [*written, *others]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--sample", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(load(args.one))
        return
    print("| format | held, MiB | peak above it, MiB |\n| --- | --- | --- |", flush=True)
    for model in [*args.models, *(sample(args.sample) if args.sample else [])]:
        subprocess.run([sys.executable, "-P", __file__, "--one", model], check=True)


if __name__ == "__main__":
    main()
