"""Throughput and latencies of a running server at several concurrencies, as a table and a plot.

    python load_tests/drive.py --url http://127.0.0.1:8000/v1 --concurrency 1,2,4,8,16

At each concurrency that many clients send ``--requests`` requests in all, each client one after
another. Prompts differ from their first word on, so that no prefix is cached. Latencies are those
which the client sees: the time to the first token, and the gaps between the tokens of a stream.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import aiohttp
import typer

from nybble.kernels.progress import Bar
from nybble.server.bench.client import Client, Timing
from nybble.server.bench.workload import random_prompt as prompt


@dataclass(frozen=True)
class Row:
    """The results at one concurrency.

    prompt_rate, token_rate: prompt and generated tokens per second.
    first, gap: p50, p95 and p99 of the time to the first token and of the gaps, in milliseconds.
    """

    concurrency: int
    failed: int
    prompt_rate: float
    token_rate: float
    first: tuple[float, float, float]
    gap: tuple[float, float, float]


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """p50, p95 and p99, in milliseconds, of values in seconds."""
    ordered = sorted(values) or [float("nan")]
    p50, p95, p99 = (
        1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.95, 0.99)
    )
    return p50, p95, p99


async def measure(client: Client, concurrency: int, requests: int, words: int, out: int) -> Row:
    todo = iter(range(requests))
    done: list[Timing] = []
    seed = random.randrange(1 << 30)
    bar = Bar(total=requests, desc=f"{concurrency} at once", leave=False)

    async def one_client() -> None:
        for index in todo:
            done.append(await client.complete(prompt(words, seed + index), out))
            bar.update()

    start = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(concurrency)))
    took = time.perf_counter() - start
    bar.close()
    good = [timing for timing in done if timing.error is None]
    for error in sorted({timing.error for timing in done if timing.error}):
        print(f"failed: {error}", file=sys.stderr)
    return Row(
        concurrency,
        failed=len(done) - len(good),
        prompt_rate=sum(timing.prompt_tokens for timing in good) / took,
        token_rate=sum(timing.tokens for timing in good) / took,
        first=percentiles([timing.first for timing in good]),
        gap=percentiles([gap for timing in good for gap in timing.gaps]),
    )


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4))
    at = [row.concurrency for row in rows]
    left.plot(at, [row.token_rate for row in rows], marker="o")
    left.set(title="Generated tokens per second", ylim=(0, None))
    for axis, name, values in (
        (middle, "Time to first token, ms", [row.first for row in rows]),
        (right, "Inter-token latency, ms", [row.gap for row in rows]),
    ):
        for index, label in enumerate(("p50", "p95", "p99")):
            axis.plot(at, [value[index] for value in values], marker="o", label=label)
        axis.set(title=name, ylim=(0, None))
        axis.legend()
    for axis in (left, middle, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [str(tick) for tick in at])
        axis.set_xlabel("requests at once")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


async def run(
    url: str, key: str | None, model: str | None, levels: list[int], requests: int, sizes: list[int]
) -> list[Row]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        if model is None:
            async with session.get(f"{url}/models", headers=headers) as response:
                response.raise_for_status()
                model = (await response.json())["data"][0]["id"]
        client = Client(session, url, model, headers)
        warm = await client.complete(prompt(8, 0), 4)
        if warm.error:
            raise SystemExit(f"{url} does not answer: {warm.error}")
        return [await measure(client, n, max(requests, n), *sizes) for n in levels]


def main(
    url: str = "http://127.0.0.1:8000/v1",
    api_key: str | None = None,
    model: Annotated[str | None, typer.Option(help="default: the first one served")] = None,
    concurrency: Annotated[str, typer.Option(help="comma-separated")] = "1,2,4,8,16",
    requests: Annotated[int, typer.Option(help="at each concurrency")] = 16,
    prompt_words: int = 128,
    max_tokens: int = 64,
    plot_to: Path | None = None,
) -> None:
    levels = [int(level) for level in concurrency.split(",")]
    rows = asyncio.run(run(url, api_key, model, levels, requests, [prompt_words, max_tokens]))
    print(
        f"{'at once':>7} {'failed':>6} {'prompt tok/s':>12} {'tok/s':>8} "
        f"{'first token ms p50/p95/p99':>27} {'inter-token ms p50/p95/p99':>27}"
    )
    for row in rows:
        first, gap = (" / ".join(f"{ms:.0f}" for ms in value) for value in (row.first, row.gap))
        print(
            f"{row.concurrency:>7} {row.failed:>6} {row.prompt_rate:>12.0f} {row.token_rate:>8.1f} "
            f"{first:>27} {gap:>27}"
        )
    if plot_to:
        plot(rows, plot_to)
        print(f"plot: {plot_to}")
    if any(row.failed for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
