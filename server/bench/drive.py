"""Sends the requests: a fixed number at a time, or each at a given time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import aiohttp

from nybble.server.bench.client import Client, Timing
from nybble.server.bench.workload import Ask


@dataclass(frozen=True)
class Sent:
    """A request that was sent. at: seconds from the start of the run until then."""

    at: float
    timing: Timing


@dataclass(frozen=True)
class Run:
    """All requests of a run. seconds: from sending the first to the end of the last answer."""

    sent: Sequence[Sent]
    seconds: float


async def first_model(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> str:
    """The first model served. Raises ValueError if there is none or the server does not answer."""
    try:
        async with session.get(f"{url}/models", headers=headers) as response:
            if response.status != 200:
                raise ValueError(f"{url}/models answers {response.status}")
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, LookupError, TypeError) as error:
        raise ValueError(
            f"{url} does not list its models: {type(error).__name__}: {error}"
        ) from error


async def closed_loop(client: Client, asks: Sequence[Ask], concurrency: int) -> Run:
    """``concurrency`` clients, each sending its next request when the last one is answered."""
    todo = iter(asks)
    run = _Recorder(client, len(asks))

    async def one_client() -> None:
        for ask in todo:
            await run.send(ask)

    await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return run.end()


async def open_loop(client: Client, asks: Sequence[Ask], arrivals: Iterable[float]) -> Run:
    """Requests sent at the given times, whether or not earlier ones have been answered."""
    run = _Recorder(client, len(asks))
    async with asyncio.TaskGroup() as tasks:
        for ask, at in zip(asks, arrivals, strict=False):
            await asyncio.sleep(max(0.0, run.start + at - time.perf_counter()))
            tasks.create_task(run.send(ask))
    return run.end()


class _Recorder:
    def __init__(self, client: Client, total: int) -> None:
        # PyTorch comes along: a server that does not answer is told of without it.
        from nybble.kernels.progress import Bar

        self._client = client
        self._sent: list[Sent] = []
        self._bar = Bar(total=total, unit="req")
        self.start = time.perf_counter()

    async def send(self, ask: Ask) -> None:
        at = time.perf_counter() - self.start
        self._sent.append(Sent(at, await self._client.complete(ask.prompt, ask.max_tokens)))
        self._bar.update()

    def end(self) -> Run:
        self._bar.close()
        return Run(self._sent, time.perf_counter() - self.start)
