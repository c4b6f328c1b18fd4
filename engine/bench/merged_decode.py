"""Decoding with an adapter merged and beside the weights, against the base alone, taking turns.

    python engine/bench/merged_decode.py BASE MERGED ADAPTER [ROUNDS]

BASE and MERGED are in one 4-bit format (``nybble merge BASE ADAPTER MERGED``), packed or not.
Prints the median time of a step at 1 and 8 sequences, and the median, least and greatest of its
ratio to the base's of the same round.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import time
from pathlib import Path

from nybble.engine import AdapterConfig, Engine, EngineConfig, Request, SamplingParams
from nybble.loaders import open_checkpoint

TOKENS, BATCHES = 33, (1, 8)


def load(folder: Path, adapter: str | None = None) -> Engine:
    config = EngineConfig(
        kv_cache_bytes=64 << 20,
        max_num_seqs=max(BATCHES),
        adapters=AdapterConfig(slots=1, max_rank=16) if adapter else None,
    )
    engine = Engine.load(open_checkpoint(folder), config, progress=False)
    if adapter:
        engine.load_adapter("adapter", adapter)
    engine.start()
    return engine


async def step_seconds(engine: Engine, count: int, adapter: str | None) -> float:
    """Median time between the tokens of ``count`` sequences that decode together."""

    async def one(index: int) -> list[float]:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=TOKENS)
        request = Request(f"{index}", (index + 1, 2, 3), params, adapter=adapter)
        return [time.perf_counter() async for _ in engine.generate(request)]

    times = await asyncio.gather(*(one(index) for index in range(count)))
    return statistics.median(b - a for t in times for a, b in itertools.pairwise(t))


def main() -> None:
    base, merged, adapter, *rest = sys.argv[1:]
    rounds = int(rest[0]) if rest else 7
    ways = {
        "base": (load(Path(base)), None),
        "merged": (load(Path(merged)), None),
        "adapter beside": (load(Path(base), adapter), "adapter"),
    }
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for count in BATCHES:
            for name, (engine, using) in ways.items():
                found = asyncio.run(step_seconds(engine, count, using))
                if turn:  # the first round warms up
                    seconds.setdefault((name, count), []).append(found)
    print(f"{'':<16}" + "".join(f"{f'{n} seq, ms':>14}{'ratio':>8}{'':13}" for n in BATCHES))
    for name in ways:
        line = f"{name:<16}"
        for count in BATCHES:
            mine, theirs = seconds[name, count], seconds["base", count]
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
            line += f"{1e3 * statistics.median(mine):14.2f}{statistics.median(ratios):8.3f}"
            line += f" ({min(ratios):.2f}–{max(ratios):.2f})"
        print(line)
    for engine, _ in ways.values():
        engine.stop()


if __name__ == "__main__":
    main()
