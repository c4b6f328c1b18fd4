"""Whether swapping a thousand adapters through a few slots delays other streams of a server.

    python load_tests/adapter_churn.py [MODEL] [--adapters 1000] [--slots 16] [--plot churn.png]

Two streams of the base model decode all the time. Requests with adapters run beside them, a few at
a time. In the first phase all use one adapter, which stays in its slot. In the second each uses
another one, so that every adapter is read from disk into host memory (64 MiB, which holds only some
of them) and copied into a slot.

Prints the inter-token latencies of the base streams. Exits with 1 if a request failed, or if the
longest gap of the second phase exceeds that of the first by more than one step (the median gap).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
from server_process import running_server, write_adapters

from nybble.server.bench.client import Client, Timing

STREAMS, BESIDE, PROMPT, OUTPUT = 2, 8, 16, 4
TARGETS = ("q_proj", "v_proj")
ADMIN = {"Authorization": "Bearer admin"}


async def register(session: aiohttp.ClientSession, url: str, names: Sequence[str]) -> None:
    for name in names:
        body = {"lora_name": name, "lora_path": name}
        async with session.post(f"{url}/load_lora_adapter", json=body, headers=ADMIN) as response:
            if response.status != 200:
                raise RuntimeError(f"{name} was not loaded: {await response.text()}")


async def steady(client: Client, timings: list[Timing], done: asyncio.Event) -> None:
    """One base stream after another until ``done``."""
    while not done.is_set():
        prompt = [random.randrange(1000, 100_000) for _ in range(PROMPT)]
        timings.append(await client.complete(prompt, 64))


async def phase(client: Client, names: Sequence[str]) -> tuple[list[float], list[Timing]]:
    """Send one request for each name beside the base streams.

    Returns the gaps of the base streams in milliseconds, and the timings of the requests.
    """
    base: list[Timing] = []
    done = asyncio.Event()
    streams = [asyncio.create_task(steady(client, base, done)) for _ in range(STREAMS)]
    left = iter(names)
    found: list[Timing] = []

    async def worker() -> None:
        for name in left:
            prompt = [random.randrange(1000, 100_000) for _ in range(PROMPT)]
            found.append(await replace(client, model=name).complete(prompt, OUTPUT))

    await asyncio.gather(*(worker() for _ in range(BESIDE)))
    done.set()
    await asyncio.gather(*streams)
    return [1e3 * gap for timing in base for gap in timing.gaps], found + base


async def measure(url: str, names: list[str]) -> dict[str, tuple[list[float], list[Timing]]]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await register(session, url, names)
        client = Client(session, url, "base")
        await phase(client, names[:1] * BESIDE)  # warm
        same = list(itertools.repeat(names[0], max(BESIDE, len(names) // 4)))
        return {
            "one adapter, in its slot": await phase(client, same),
            "another adapter each": await phase(client, names),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        names = write_adapters(Path(scratch), args.model, args.adapters, TARGETS)
        options = ["--lora-root", scratch, "--admin-key", "admin", "--lora-host-memory", "64MiB"]
        options += ["--max-loras", str(args.slots), "--max-lora-rank", "16"]
        with running_server(args.model, *options, "--max-num-seqs", "16") as url:
            phases = asyncio.run(measure(url, names))
    print(f"{'requests beside':<26}{'count':>6}{'failed':>8}", end="")
    print(f"{'gaps':>7}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>8}  ms")
    failed = 0
    for label, (gaps, timings) in phases.items():
        errors = [timing.error for timing in timings if timing.error is not None]
        failed += len(errors)
        quantiles = np.percentile(gaps, [50, 95, 99, 100])
        print(f"{label:<26}{len(timings):>6}{len(errors):>8}{len(gaps):>7}", end="")
        print(*(f"{ms:7.1f}" for ms in quantiles), *errors[:1])
    if args.plot is not None:
        plot({label: gaps for label, (gaps, _) in phases.items()}, args.plot)
    (without, _), (under, _) = phases.values()
    step = float(np.median(under))
    stall = max(under) - max(without)
    print(
        f"longest gap under churn less the longest without: {stall:.1f} ms; a step: {step:.1f} ms"
    )
    if failed or stall > step:
        sys.exit(f"{failed} requests failed; a stall beyond one step: {stall > step}")


def plot(phases: dict[str, list[float]], target: Path) -> None:
    """Cumulative distributions of the gaps."""
    import matplotlib.pyplot as plt

    for label, gaps in phases.items():
        plt.plot(np.sort(gaps), np.arange(1, len(gaps) + 1) / len(gaps), label=label)
    plt.xlabel("inter-token latency of base streams (ms)")
    plt.ylabel("share of tokens")
    plt.legend(title="requests beside")
    plt.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
