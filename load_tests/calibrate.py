"""Measures what a server costs, for `simulate.py capacity --calibration`, and checks that.

    python load_tests/calibrate.py calibration.json [--model demo] [--streams 1,4,16] [--check 60]

Starts a server with as many adapter slots as the largest of --streams and twice as many adapters of
rank 16 on all linear layers, and asks it as a client does:

- how much later a first token comes if the request's adapter is read and copied into a slot, or
  only copied, than if it is in its slot,
- the time of a decode step with that many streams, each with an adapter in its slot,
- the tokens of a prompt by the time to its first token.

Adapters are read from files that were written just before, which the operating system still has in
memory: from a disk or a shared place reading takes longer.

With --check the server then gets requests at random moments for so many seconds, of which the
second half counts, at half of the rate at which it would fall behind. The simulation of one such
replica gets the same. How long requests took is printed for both.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from compare_servers import PROJECTIONS, RANK, measured, processor
from server_process import running_server, write_adapters
from simulate import Calibration, World, arrivals, route

from nybble.kernels.progress import Bar
from nybble.server.bench.client import Client, Timing
from nybble.server.bench.workload import random_prompt

SHORT = 16  # words of a prompt whose time does not matter


@dataclass
class Server:
    """The server that is measured. names: of its adapters. slots: how many it computes with."""

    session: aiohttp.ClientSession
    url: str
    names: Sequence[str]
    slots: int
    prompts: int = 0

    async def ask(self, adapter: int, words: int, tokens: int) -> Timing:
        """Raises SystemExit if the server refuses."""
        self.prompts += 1
        client = Client(self.session, self.url, self.names[adapter])
        timing = await client.complete(random_prompt(words, 10**6 + self.prompts), tokens)
        if timing.error:
            raise SystemExit(f"the server failed: {timing.error}")
        return timing


async def delays(server: Server) -> tuple[float, float]:
    """Seconds that a request waits for its adapter to be copied into a slot; and to be read."""

    async def first_tokens(adapters: Sequence[int]) -> float:
        return statistics.median([(await server.ask(a, SHORT, 1)).first for a in adapters])

    everyone = range(len(server.names))
    await server.ask(everyone[-1], SHORT, 1)  # what a first request of all does besides
    # One after the other, so that each finds its slot taken by one before.
    read = await first_tokens(everyone[:-1])
    copied = await first_tokens(everyone)
    there = await first_tokens(everyone[-server.slots :])
    return max(0.0, copied - there), max(0.0, read - copied)


async def step(server: Server, streams: int, tokens: int) -> float:
    """Seconds of a decode step with so many sequences, all of whose adapters are in slots."""
    last = range(len(server.names))[-server.slots :]
    answers = [server.ask(last[i], SHORT, tokens) for i in range(streams)]
    return streams / measured(await asyncio.gather(*answers)).decode


async def calibration(
    server: Server, streams: Sequence[int], rounds: int, words: int, tokens: int
) -> tuple[Calibration, int]:
    """What the server costs, and the tokens of a prompt of so many words."""
    fill, read = await delays(server)
    steps = {}
    for count in Bar(streams, desc="steps"):
        found = [await step(server, count, tokens) for _ in range(rounds + 1)]
        steps[count] = statistics.median(found[1:])  # the first warms up
    prompts = [await server.ask(len(server.names) - 1, words, 1) for _ in range(rounds + 1)]
    rate = statistics.median(each.prompt_tokens / each.first for each in prompts[1:])
    return Calibration(steps, rate, fill, read), round(
        statistics.mean(each.prompt_tokens for each in prompts)
    )


async def real(server: Server, world: World, words: int) -> list[float]:
    """Seconds of the requests of which `simulate.route` says them for one replica."""
    took: list[float] = []
    tasks, begin, at = [], time.perf_counter(), 0.0

    async def one(adapter: int, counts: bool) -> None:
        timing = await server.ask(adapter, words, world.tokens)
        if counts:
            took.append(timing.arrivals[-1])

    for i, (adapter, gap) in enumerate(Bar(list(arrivals(world)), desc="check")):
        at += gap
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(adapter, i >= world.requests)))
    await asyncio.gather(*tasks)
    return took


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def run(
    url: str, names: Sequence[str], slots: int, streams: Sequence[int], settings: dict[str, int]
) -> dict[str, Any]:
    words, tokens = settings["words"], settings["tokens"]
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        server = Server(session, url, names, slots)
        found, prompt = await calibration(server, streams, settings["rounds"], words, tokens)
        world = World(
            replicas=1,
            adapters=len(names),
            slots=slots,
            host=len(names),
            prompt=prompt,
            tokens=tokens,
            seconds=settings["check"] / 2,
            calibration=found,
        )
        # As many at once as were measured: more would be a guess.
        most = max(streams) / world.request_seconds(max(streams))
        world = replace(world, rate=most / 2)
        if world.requests:
            fleet, _ = route(world, "random")
            for name, took in (
                ("real", await real(server, world, words)),
                ("simulated", fleet.took),
            ):
                p50, p99 = (quantile(took, share) for share in (0.5, 0.99))
                print(
                    f"{name}: {len(took)} requests of {prompt} + {tokens} tokens, "
                    f"{world.rate:.2f} a second: {statistics.mean(took):.2f} s on average, "
                    f"p50 {p50:.2f}, p99 {p99:.2f}"
                )
    return asdict(found)


def main(
    output: Annotated[Path, typer.Argument(help="file to write, for simulate.py")],
    model: Annotated[str, typer.Option(help="folder or name")] = "demo",
    streams: Annotated[str, typer.Option(help="sequences in a step, comma-separated")] = "1,4,16",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    words: Annotated[int, typer.Option(min=1, help="of the prompt whose rate is measured")] = 400,
    tokens: Annotated[int, typer.Option(min=2, help="of each stream")] = 64,
    check: Annotated[int, typer.Option(min=0, help="seconds; 0 for none")] = 0,
    device: Annotated[str, typer.Option(help="of the server")] = "auto",
) -> None:
    """Measure a server for the simulation of many."""
    counts = sorted({int(count) for count in streams.split(",")})
    if len(counts) < 2 or counts[0] < 1:
        raise SystemExit(f"--streams {streams}: expected two numbers or more, from 1 on")
    slots = counts[-1]
    targets = [name.split(".")[1] for name in PROJECTIONS]
    with tempfile.TemporaryDirectory() as scratch:
        names = write_adapters(Path(scratch), model, 2 * slots, targets, ranks=(RANK,))
        size = sum(file.stat().st_size for file in Path(scratch).rglob("*.safetensors"))
        options = ["--lora-source", scratch, "--lora-host-memory", str(2 * size)]
        options += ["--max-loras", str(slots), "--max-lora-rank", str(RANK), "--device", device]
        settings = {"rounds": rounds, "words": words, "tokens": tokens, "check": check}
        with running_server(model, *options, "--max-num-seqs", str(slots)) as url:
            found = asyncio.run(run(url, names, slots, counts, settings))
    about = {"model": model, "machine": processor(), "date": date.today().isoformat()}
    output.write_text(json.dumps(about | found, indent=1) + "\n")
    print(output.read_text(), end="")


if __name__ == "__main__":
    typer.run(main)
