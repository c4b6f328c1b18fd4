"""Whether a tenant that floods a live server delays another's first tokens.

    python load_tests/fairness.py [MODEL] [--plot fairness.png] [--adapters]

A quiet tenant sends one request per second. Its time to the first token is measured

- alone on the whole server,
- alone at an equal share: a server with half the cores, sequences, token budget and KV cache
  (memory bandwidth is not halved, so this is somewhat more than half a server),
- on the whole server beside a tenant which always has 24 requests in flight, with weights 1:1 and
  3:1 in favour of the quiet one.

Exits with 1 if the quiet tenant's p95 at 1:1 is more than twice that at an equal share.

With --adapters both tenants use an adapter on every request: the flooding one cycles through 16, of
which 4 fit on the device, and the quiet one always uses the same.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
from server_process import running_server, write_adapters

from nybble.server.bench.client import Client, Timing
from nybble.server.tenancy.tenants import new_key

PROMPT, OUTPUT = 96, 8
FLOOD, FLOOD_PROMPT, FLOOD_OUTPUT = 24, 256, 32
SEATS, BUDGET, KV_MIB = 16, 128, 512
SECONDS, RATE = 24, 1.0
ALLOWED = 2.0


def prompt(length: int) -> list[int]:
    """Random tokens. No other prompt begins with them, so that no prefix is cached."""
    return [random.randrange(1000, 100_000) for _ in range(length)]


async def quiet(client: Client) -> list[Timing]:
    """A request every 1/RATE seconds, whether or not the last has been answered."""
    requests = []
    begin = time.perf_counter()
    for turn in range(int(SECONDS * RATE)):
        await asyncio.sleep(max(0.0, begin + turn / RATE - time.perf_counter()))
        requests.append(asyncio.create_task(client.complete(prompt(PROMPT), OUTPUT)))
    return list(await asyncio.gather(*requests))


async def flood(client: Client, models: Sequence[str], served: list[Timing]) -> None:
    """Keep FLOOD requests in flight until cancelled."""
    turns = itertools.cycle(models)

    async def one() -> None:
        while True:
            await asyncio.sleep(0)
            each = replace(client, model=next(turns))
            served.append(await each.complete(prompt(FLOOD_PROMPT), FLOOD_OUTPUT))

    await asyncio.gather(*(one() for _ in range(FLOOD)))


async def measure(
    url: str, keys: dict[str, str], models: dict[str, list[str]], *, flooded: bool
) -> tuple[list[Timing], list[Timing]]:
    """Timings of the quiet tenant and of the flood."""
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        def client(tenant: str) -> Client:
            headers = {"Authorization": f"Bearer {keys[tenant]}"}
            return Client(session, url, models[tenant][0], headers)

        await client("quiet").complete(prompt(PROMPT), OUTPUT)
        served: list[Timing] = []
        noise = None
        if flooded:
            noise = asyncio.create_task(flood(client("flood"), models["flood"], served))
            await asyncio.sleep(5)
        timings = await quiet(client("quiet"))
        if noise is not None:
            noise.cancel()
            with suppress(asyncio.CancelledError):
                await noise
        return timings, served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--adapters", action="store_true")
    args = parser.parse_args()
    random.seed(0)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = {"quiet": ["base"], "flood": ["base"]}
        lora: list[str] = []
        if args.adapters:
            names = write_adapters(folder / "lora", args.model, 17, ("q_proj", "v_proj"))
            models = {"quiet": names[:1], "flood": names[1:]}
            lora = ["--max-loras", "4", "--max-lora-rank", "16"]
            for name in names:
                lora += ["--lora-modules", f"{name}={folder / 'lora' / name}"]
        keys, lines = {}, []
        for tenant in ("quiet", "flood"):
            keys[tenant], stored = new_key()
            lines.append(f'[tenants.{tenant}]\nkeys = ["{stored}"]\nweight = ')
        even, favoured = folder / "even.toml", folder / "favoured.toml"
        even.write_text(f"{lines[0]}1\n{lines[1]}1\n")
        favoured.write_text(f"{lines[0]}3\n{lines[1]}1\n")

        def sizes(share: int) -> list[str]:
            return [
                *("--max-num-seqs", str(SEATS // share)),
                *("--max-batched-tokens", str(BUDGET // share)),
                *("--kv-cache-memory", f"{KV_MIB // share}MiB", *lora),
            ]

        phases = (
            ("alone", even, 1, False),
            ("alone at equal share", even, 2, False),
            ("beside a flood, 1:1", even, 1, True),
            ("beside a flood, 3:1", favoured, 1, True),
        )
        print(f"time to first token, ms{'':9} {'count':>5} {'p50':>7} {'p95':>7} {'max':>7}")
        failed = 0
        cores = max(1, len(os.sched_getaffinity(0)) // 2)
        for label, tenants, share, flooded in phases:
            options = ["--tenants", str(tenants), *sizes(share)]
            with running_server(args.model, *options, cores=cores if share == 2 else None) as url:
                timings, served = asyncio.run(measure(url, keys, models, flooded=flooded))
            errors = [t.error for t in (*timings, *served) if t.error is not None]
            failed += len(errors)
            found[label] = [1e3 * t.first for t in timings if t.error is None]
            p50, p95, most = np.percentile(found[label], [50, 95, 100])
            note = f"  flood: {sum(t.tokens for t in served)} tokens" if flooded else ""
            note += f"  {len(errors)} errors, first: {errors[0]}" if errors else ""
            print(f"{label:<32} {len(found[label]):>5} {p50:7.0f} {p95:7.0f} {most:7.0f}{note}")
    shared = float(np.percentile(found["alone at equal share"], 95))
    ratios = {
        label: float(np.percentile(found[label], 95)) / shared
        for label, *_, noisy in phases
        if noisy
    }
    for label, ratio in ratios.items():
        print(f"{label}: p95 is {ratio:.2f} × that alone at equal share")
    if args.plot is not None:
        plot(found, args.plot)
    if failed or ratios["beside a flood, 1:1"] > ALLOWED:
        sys.exit(f"failed requests: {failed}; allowed is {ALLOWED} × at 1:1")


def plot(found: dict[str, list[float]], target: Path) -> None:
    """Cumulative distributions."""
    import matplotlib.pyplot as plt

    for label, values in found.items():
        plt.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), label=label)
    plt.xlabel("time to first token of the quiet tenant (ms)")
    plt.ylabel("share of its requests")
    plt.xlim(left=0)
    plt.legend()
    plt.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
