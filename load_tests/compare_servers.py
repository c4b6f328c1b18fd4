"""This server beside others on the same machine: same model, prompts, threads and output lengths.

    python load_tests/compare_servers.py my-servers.toml [--streams 1,8,32] [--rounds 5]

The TOML file describes the servers. ``servers.toml`` beside this script is an example, and says
how each is installed. For every number of streams all servers are started, and each round goes from
one to the next: a server gets that many prompts at once, while the others are idle. The first round
only warms up. Prompts are random words; none begins as another does. With --adapters every stream
uses an adapter of its own, of rank 16 on all projections with random weights; servers which cannot
are left out.

The tables have the medians of the rounds, with the least and the greatest:

- decode: tokens per second of all streams together, after each has received its first token,
- prefill: the tokens of all prompts by the time until every stream has received its first token,
- first token: milliseconds until then, the median of a round's streams,
- the first server's decode and prefill as multiples of each other one's, round by round.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import statistics
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import aiohttp
import typer
from server_process import write_adapters

from nybble.kernels.progress import Bar
from nybble.loaders import open_checkpoint, resolve_model
from nybble.server.bench.client import Client, Timing
from nybble.server.bench.drive import first_model
from nybble.server.bench.workload import random_prompt

RANK = 16
# llama.cpp's names for the projections of Llama's layers.
PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# What decides which kernels a CPU runs.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")


@dataclass(frozen=True)
class Server:
    """One server of the TOML file; ``servers.toml`` explains the fields."""

    name: str
    command: str
    bits: str
    env: dict[str, str] = field(default_factory=dict)
    adapters: str | None = None
    adapter_field: Literal["model", "lora"] = "model"


@dataclass(frozen=True)
class Adapters:
    """Adapters in the forms that the servers take: names, folders of PEFT's, and GGUF files."""

    names: Sequence[str]
    folders: Sequence[Path]
    ggufs: Sequence[Path]


@dataclass(frozen=True)
class Round:
    """What one server did in one round: tokens per second, and seconds to the first token."""

    decode: float
    prefill: float
    first: float


def read_servers(path: Path) -> list[Server]:
    """The servers of a TOML file. Raises SystemExit naming the file if it cannot be used."""
    try:
        return [Server(**each) for each in tomllib.loads(path.read_text())["server"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: {error!r}") from error


def make_adapters(folder: Path, model: str, count: int) -> Adapters:
    names = write_adapters(
        folder, model, count, [name.split(".")[1] for name in PROJECTIONS], ranks=(RANK,)
    )
    architecture = str(open_checkpoint(resolve_model(model)).config.model_type)
    ggufs = [write_gguf(folder / name, architecture) for name in names]
    return Adapters(names, [folder / name for name in names], ggufs)


def write_gguf(folder: Path, architecture: str) -> Path:
    """The adapter in ``folder`` as a GGUF file. The rows of q and k keep their order."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    path = folder / "adapter.gguf"
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", RANK)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer, _, rest = name.removeprefix("base_model.model.model.layers.").partition(".")
        module, _, matrix = rest.removesuffix(".weight").rpartition(".")
        writer.add_tensor(f"blk.{layer}.{PROJECTIONS[module]}.weight.{matrix.lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def running(
    server: Server, values: dict[str, str], adapters: Adapters | None, log: Path
) -> Iterator[str]:
    """Start a server and yield its URL (…/v1). Raises SystemExit if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        values = {**values, "port": str(free.getsockname()[1])}
    command = server.command
    if adapters:
        command = f"{command} {server.adapters}"
        named = [
            f"{name}={folder}"
            for name, folder in zip(adapters.names, adapters.folders, strict=True)
        ]
        values |= {
            "peft": " ".join(named),
            "options": " ".join(f"--lora-modules {each}" for each in named),
            "gguf": ",".join(map(str, adapters.ggufs)),
            "count": str(len(adapters.names)),
            "rank": str(RANK),
        }
    env = {name: value.format(**values) for name, value in server.env.items()}
    with log.open("w") as output:
        process = subprocess.Popen(
            shlex.split(command.format(**values)),
            env=os.environ | env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{values['port']}"
        try:
            if not asyncio.run(healthy(url, process)):
                said = log.read_text()[-3000:]
                raise SystemExit(f"{server.name} ended with code {process.returncode}:\n{said}")
            yield f"{url}/v1"
        finally:
            process.terminate()
            process.wait()


async def healthy(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until ``/health`` reports ok; whether it did before the process ended."""
    async with aiohttp.ClientSession() as session:
        while process.poll() is None:
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return True
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
    return False


def measured(timings: Sequence[Timing]) -> Round:
    """One server's round. An event may hold several tokens, or none if a character is cut."""
    last_first = max(timing.first for timing in timings)
    end = max(timing.arrivals[-1] for timing in timings)
    tokens = sum(
        timing.tokens * sum(at > last_first for at in timing.arrivals) / len(timing.arrivals)
        for timing in timings
    )
    return Round(
        decode=tokens / (end - last_first),
        prefill=sum(timing.prompt_tokens for timing in timings) / last_first,
        first=statistics.median(timing.first for timing in timings),
    )


async def one_round(
    server: Server, url: str, prompts: Sequence[str], max_tokens: int, adapters: Adapters | None
) -> Round:
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        base = await first_model(session, url, {})

        def client(stream: int) -> Client:
            if adapters is None:
                return Client(session, url, base)
            number = stream % len(adapters.names)
            if server.adapter_field == "model":
                return Client(session, url, adapters.names[number])
            return Client(session, url, base, extra={"lora": [{"id": number, "scale": 1.0}]})

        timings = await asyncio.gather(
            *(client(i).complete(prompt, max_tokens) for i, prompt in enumerate(prompts))
        )
    for timing in timings:
        if timing.error:
            raise SystemExit(f"{server.name} failed: {timing.error}")
    return measured(timings)


def compare(
    servers: Sequence[Server],
    streams: int,
    rounds: int,
    sizes: tuple[int, int],
    values: dict[str, str],
    adapters: Adapters | None,
    logs: Path,
) -> dict[str, list[Round]]:
    """The rounds of every server by its name, for one number of streams."""
    words, max_tokens = sizes
    figures: dict[str, list[Round]] = {server.name: [] for server in servers}
    with ExitStack() as stack:
        urls = [
            stack.enter_context(running(server, values, adapters, logs / f"{index}.log"))
            for index, server in enumerate(servers)
        ]
        for turn in Bar(range(rounds + 1), desc=f"{streams} streams (the first round warms up)"):
            prompts = [random_prompt(words, 10**6 + turn * streams + i) for i in range(streams)]
            turns = list(zip(servers, urls, strict=True))
            for server, url in turns if turn % 2 else reversed(turns):
                done = asyncio.run(one_round(server, url, prompts, max_tokens, adapters))
                if turn:
                    figures[server.name].append(done)
    return figures


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the least and the greatest in parentheses."""
    middle, low, high = (
        f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low}–{high})"


def table(figures: dict[str, list[Round]], streams: int) -> str:
    """The rounds of one number of streams as a Markdown table."""
    lines = [
        f"| {streams} streams | decode, tokens/s | prefill, tokens/s | first token, ms "
        "| decode: first ÷ this | prefill: first ÷ this |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    (ours, *_) = figures.values()
    for name, rounds in figures.items():
        ratios = ["", ""]
        if rounds is not ours:
            pairs = list(zip(ours, rounds, strict=True))
            ratios = [
                spread([a.decode / b.decode for a, b in pairs], 2),
                spread([a.prefill / b.prefill for a, b in pairs], 2),
            ]
        cells = [
            name,
            spread([each.decode for each in rounds], 1),
            spread([each.prefill for each in rounds], 0),
            spread([1e3 * each.first for each in rounds], 0),
            *ratios,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processor() -> str:
    """The processor's name and what of FEATURES it has, as Linux tells."""
    info = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    about = {name.strip(): value.strip() for name, value in info.items()}
    flags = set(about["flags"].split())
    return (
        f"{about['model name']} (family {about['cpu family']}, model {about['model']}), "
        + ", ".join(name for name in FEATURES if name in flags)
    )


def plot(figures: dict[int, dict[str, list[Round]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    titles = ("Decode, tokens/s", "Prefill, tokens/s", "Time to first token, s")
    for axis, title, name in zip(axes, titles, ("decode", "prefill", "first"), strict=True):
        for server in next(iter(figures.values())):
            values = [[getattr(each, name) for each in of[server]] for of in figures.values()]
            middle = [statistics.median(each) for each in values]
            errors = [
                [m - min(v) for m, v in zip(middle, values, strict=True)],
                [max(v) - m for m, v in zip(middle, values, strict=True)],
            ]
            axis.errorbar(list(figures), middle, errors, marker="o", capsize=3, label=server)
        axis.set(title=title, xlabel="streams", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(figures), [str(each) for each in figures])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    servers_file: Annotated[Path, typer.Argument(help="TOML file of servers; ours first")],
    model: Annotated[str, typer.Option(help="16-bit checkpoint: folder or name")] = "demo",
    streams: Annotated[str, typer.Option(help="requests at once, comma-separated")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    prompt_words: Annotated[int, typer.Option(help="about as many tokens")] = 400,
    max_tokens: int = 64,
    threads: Annotated[int, typer.Option(help="of every server")] = os.cpu_count() or 1,
    adapters: Annotated[bool, typer.Option(help="an adapter of rank 16 for every stream")] = False,
    only: Annotated[str, typer.Option(help="names of servers, comma-separated")] = "",
    plot_to: Path | None = None,
) -> None:
    """Measure the servers, which are started and stopped here, and print Markdown tables."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    servers = [each for each in read_servers(servers_file) if not names or each.name in names]
    if adapters:
        servers = [each for each in servers if each.adapters is not None]
    if not servers:
        raise SystemExit(f"{servers_file}: no server is left to measure")
    levels = [int(each) for each in streams.split(",")]
    context = 2 * prompt_words + max_tokens
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        made = make_adapters(Path(scratch), model, min(8, max(levels))) if adapters else None
        for level in levels:
            values = {
                "model": model,
                "threads": str(threads),
                "streams": str(level),
                "context": str(context),
                "total": str(context * level),
            }
            sizes = (prompt_words, max_tokens)
            figures[level] = compare(servers, level, rounds, sizes, values, made, Path(scratch))
    print(f"{processor()}; {threads} threads, {date.today():%d %B %Y}")
    print(f"{prompt_words} words and {max_tokens} tokens out, {rounds} rounds", end="")
    print(", adapters of rank 16" if adapters else "", end="\n\n")
    for server in servers:
        print(f"- {server.name}: {server.bits}")
    for level, found in figures.items():
        print(f"\n{table(found, level)}")
    if plot_to:
        plot(figures, plot_to)
        print(f"\nplot: {plot_to}")


if __name__ == "__main__":
    typer.run(main)
