"""What swapping adapters does to those who do not use them: inter-token latency under churn.

    python engine/bench/adapter_churn.py MODEL [PLOT.png]

Streams of the base model decode all the time, beside them short requests come one after another:
first none, then all with one adapter that stays in its slot, then each with another adapter, which
has to come from disk through host memory into a slot. The table is of the base streams only.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from nybble.engine import AdapterConfig, Engine, EngineConfig, Request, SamplingParams
from nybble.loaders import Checkpoint, open_checkpoint
from nybble.loaders.adapter import projection_shapes
from safetensors.torch import save_file

RANK, ADAPTERS, SLOTS, IN_HOST = 16, 24, 4, 6
STREAMS, SECONDS = 4, 12


def write_adapters(folder: Path, checkpoint: Checkpoint) -> Iterator[Path]:
    """Random adapters on all projections, in PEFT's layout."""
    shapes = projection_shapes(checkpoint.config)
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    for index in range(ADAPTERS):
        path = folder / str(index)
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for name, (out, columns) in shapes.items():
            prefix = f"base_model.model.{name}.lora_"
            tensors[prefix + "A.weight"] = torch.randn(RANK, columns).bfloat16()
            tensors[prefix + "B.weight"] = torch.randn(out, RANK).mul(1e-4).bfloat16()
        save_file(tensors, path / "adapter_model.safetensors")
        yield path


async def stream(engine: Engine, name: str, gaps: list[float], until: float) -> None:
    """A base stream; records the time between its tokens until ``until``."""
    for turn in itertools.count():
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=400)
        previous = None
        async for _ in engine.generate(Request(f"{name} {turn}", (1, 2, 3), params)):
            now = time.perf_counter()
            if previous is not None:
                gaps.append(now - previous)
            previous = now
            if now > until:
                return


async def phase(engine: Engine, name: str, adapters: list[str]) -> tuple[list[float], int]:
    """Gaps of the base streams while requests with ``adapters`` in turn come, and how many came."""
    until = time.perf_counter() + SECONDS
    gaps: list[float] = []
    streams = [
        asyncio.create_task(stream(engine, f"{name} {index}", gaps, until))
        for index in range(STREAMS)
    ]
    served = 0
    for adapter in itertools.cycle(adapters) if adapters else ():
        if time.perf_counter() > until:
            break
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=4)
        ids = tuple(range(100 + served, 116 + served))
        async for _ in engine.generate(Request(f"{name} r{served}", ids, params, adapter=adapter)):
            pass
        served += 1
    await asyncio.gather(*streams)
    return gaps, served


def main() -> None:
    checkpoint = open_checkpoint(Path(sys.argv[1]))
    phases: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = list(write_adapters(Path(scratch), checkpoint))
        size = sum(r + c for r, c in projection_shapes(checkpoint.config).values()) * RANK * 2
        config = EngineConfig(
            max_num_seqs=16,
            adapters=AdapterConfig(SLOTS, RANK, host_bytes=IN_HOST * size * 5 // 4),
        )
        engine = Engine.load(checkpoint, config)
        engine.warm_up()
        for path in paths:
            engine.load_adapter(path.name, str(path))
        engine.start()
        names = [path.name for path in paths]
        print(f"{ADAPTERS} adapters of {size / 1e6:.1f} MB, {SLOTS} slots; milliseconds")
        print(f"{'requests beside':<24}{'count':>6}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>8}")
        for label, adapters in (
            ("none", []),
            ("one adapter, in a slot", names[:1]),
            ("another adapter each", names),
        ):
            gaps, served = asyncio.run(phase(engine, label, adapters))
            phases[label] = gaps
            quantiles = np.percentile(np.array(gaps) * 1e3, [50, 95, 99, 100])
            print(f"{label:<24}{served:>6}", *(f"{ms:7.1f}" for ms in quantiles))
        engine.stop()
    if len(sys.argv) > 2:
        plot(phases, Path(sys.argv[2]))


def plot(phases: dict[str, list[float]], target: Path) -> None:
    """Cumulative distributions of the gaps."""
    import matplotlib.pyplot as plt

    for label, gaps in phases.items():
        values = np.sort(np.array(gaps) * 1e3)
        plt.plot(values, np.arange(1, len(values) + 1) / len(values), label=label)
    plt.xlabel("inter-token latency of base streams (ms)")
    plt.ylabel("share of tokens")
    plt.legend(title="requests beside")
    plt.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
