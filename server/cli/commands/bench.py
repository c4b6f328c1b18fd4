"""``nybble bench``: load on a running server."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.plotting import require_plot

# Options by the panel that `--help` shows them in.
_load = partial(typer.Option, rich_help_panel="Load")
_prompts = partial(typer.Option, rich_help_panel="Prompts")
_results = partial(typer.Option, rich_help_panel="Results")


def bench(
    url: Annotated[str, typer.Option(help="Up to /v1.")] = "http://127.0.0.1:8000/v1",
    api_key: Annotated[str | None, typer.Option(help="Key to send.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the first one served.")] = None,
    requests: Annotated[int, _load(min=1)] = 100,
    concurrency: Annotated[int | None, _load(help="Requests at once (default: 8).", min=1)] = None,
    rate: Annotated[
        float | None,
        _load(
            help="Requests a second, arriving at random (Poisson), instead of --concurrency.",
            min=0.001,
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        _prompts(
            help="JSON lines of 'prompt', or ShareGPT's 'conversations' (default: random words).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    prompt_words: Annotated[str, _prompts(help="128, 64-256, or ~128 (exponential).")] = "128",
    max_tokens: Annotated[
        str | None,
        _prompts(help="To generate, in the same notation (default: 64, or as the dataset has it)."),
    ] = None,
    ignore_eos: Annotated[
        bool, _prompts(help="Generate exactly so many; not every server knows it.")
    ] = True,
    seed: Annotated[int, _prompts()] = 0,
    slo: Annotated[
        str | None, _results(help="ttft:500,tpot:50,e2e:9000 (ms), for goodput.")
    ] = None,
    json_to: Annotated[Path | None, _results("--json", help="File to write.")] = None,
    plot: Annotated[Path | None, _results(help="Image.")] = None,
) -> None:
    """Send load to an OpenAI-compatible server and measure what a client sees."""
    with expected_errors(), interruptible():
        import asyncio

        import aiohttp
        from pydantic_core import to_json

        from nybble.server.bench import report, workload
        from nybble.server.bench.client import Client
        from nybble.server.bench.drive import Run, closed_loop, first_model, open_loop

        require_plot(plot)
        if rate is not None and concurrency is not None:
            raise ValueError("--rate and --concurrency exclude each other")
        limits = report.parse_slo(slo) if slo else {}
        asks = (
            workload.random_asks(requests, prompt_words, max_tokens or "64", seed)
            if dataset is None
            else workload.dataset_asks(dataset, requests, max_tokens, seed)
        )
        base = url.rstrip("/")

        async def run() -> tuple[str, Run]:
            headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
            timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
                name = model or await first_model(session, base, headers)
                client = Client(session, base, name, headers, ignore_eos=ignore_eos)
                warm = await client.complete("warm", 2)
                if warm.error:
                    raise ValueError(f"{base} does not answer: {warm.error}")
                if rate is not None:
                    arrivals = workload.poisson_arrivals(rate, seed)
                    return name, await open_loop(client, asks, arrivals)
                return name, await closed_loop(client, asks, concurrency or 8)

        name, done = asyncio.run(run())
        load = f"{concurrency or 8} at once" if rate is None else f"{rate:g} requests/s"
        summary = {"url": base, "model": name, "load": load, **report.summarize(done, limits)}
        print(report.table(summary))
        if json_to is not None:
            json_to.write_bytes(to_json(summary, indent=2, inf_nan_mode="null") + b"\n")
        if plot is not None:
            report.plot(done, plot, f"{name}, {load}")
        if summary["failed"]:
            raise typer.Exit(1)
