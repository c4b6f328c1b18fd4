"""Whether a server under mixed traffic, for as long as you like, leaks memory or loses anything.

    python load_tests/soak.py --minutes 30 --out soak.json --plot-to soak.png

Starts a server of its own, by default with a tiny model, so that it answers as many requests as
possible. Every ``--every`` seconds all clients pause. Once the server is idle, this script reads
its memory (the part that its processes share with no other), open files, threads, asyncio tasks and
KV blocks in use. The run passes if, after its first third,

- memory is flat: its trend (Theil–Sen) over the rest of the run is at most 8 MiB or 2 %,
- at every pause no KV block is in use and the engine has no sequence,
- open files, threads and tasks at the end are at most 2 more than at the first of these pauses,

and if every request got an answer which it may get. Exits with 1 otherwise.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from traffic import KINDS, Target, Unexpected

from nybble.kernels.progress import Bar

ROOT = Path(__file__).parents[1]
ADAPTERS = tuple(f"adapter-{index}" for index in range(6))
KEYS = {"plain": "soak-plain", "acme": "soak-acme"}
ADMIN = "soak-admin"
SERVE = "from nybble.server.cli.main import main; main()"
WARM_UP = 1 / 3  # the share of the run that is not judged
MEMORY_BYTES, MEMORY_PART = 8 << 20, 0.02
SPARE = 2  # how many more files, threads or tasks there may be
IDLE_SECONDS = 60


@dataclass(frozen=True)
class Sample:
    """What is measured while the server is idle.

    seconds: since the start of the traffic.
    requests: sent until then.
    uss, rss: unique and resident memory, in bytes.
    """

    seconds: float
    requests: int
    uss: int
    rss: int
    files: int
    threads: int
    tasks: int
    kv_blocks: int
    sequences: int


@dataclass
class Run:
    """The results of a run.

    counts: numbers of requests, by kind and outcome.
    unexpected: answers which a request should not get.
    broken: the criteria which the run failed.
    """

    counts: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def tiny_model(folder: Path) -> Path:
    """A model with random weights and a chat template that supports tools."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: Path = module.write_tiny_model(folder, max_length=1024)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    shown = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<tool_call>"
    settings["chat_template"] = shown + settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(settings["chat_template"])
    return model


def write_adapters(folder: Path, model: Path) -> None:
    """Small random adapters on all projections of the model."""
    import torch
    from safetensors.torch import save_file

    from nybble.loaders import open_checkpoint
    from nybble.models import architecture_of

    linears = architecture_of(open_checkpoint(model).config).linears
    targets = sorted({each.leaf for each in linears.values()})
    for rank, name in enumerate(ADAPTERS, 1):
        (folder / name).mkdir(parents=True)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for module, each in linears.items():
            out, columns = each.out, each.inputs
            prefix = f"base_model.model.{module}.lora_"
            tensors[prefix + "A.weight"] = torch.randn(rank, columns) * columns**-0.5
            tensors[prefix + "B.weight"] = torch.randn(out, rank) * 0.01
        save_file(tensors, folder / name / "adapter_model.safetensors")


@contextmanager
def server(model: str, work: Path, log: Path) -> Iterator[tuple[int, str]]:
    """Yield the server's process id and its origin once it is ready."""
    from nybble.loaders import resolve_model

    folder = tiny_model(work / "model") if model == "tiny" else resolve_model(model)
    write_adapters(work / "adapters", folder)
    hashed = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    limits = {"plain": "weight = 2", "acme": "requests_per_minute = 20"}
    (work / "tenants.toml").write_text(
        "".join(
            f'[tenants.{name}]\nkeys = ["sha256:{hashed[name]}"]\n{limits[name]}\n' for name in KEYS
        )
    )
    options = ["--served-model-name", "soak", "--port", "0", "--log-format", "json"]
    options += ["--max-num-seqs", "16", "--kv-cache-memory", "16MiB" if model == "tiny" else "auto"]
    options += ["--max-loras", "3", "--max-lora-rank", "8", "--admin-key", ADMIN]
    options += ["--lora-root", str(work / "adapters"), "--lora-state", str(work / "state.json")]
    options += ["--tenants", str(work / "tenants.toml")]
    name = str(folder) if model == "tiny" else model
    command = [sys.executable, "-P", "-c", SERVE, "serve"]
    with log.open("w") as stream:
        process = subprocess.Popen([*command, "--model", name, *options], stderr=stream)
    try:
        while not (found := re.search(r"(http://[^\s\"/]+)/v1", log.read_text())):
            if process.poll() is not None:
                raise SystemExit("the server did not start:\n" + log.read_text())
            time.sleep(0.1)
        yield process.pid, found[1]
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def processes(pid: int) -> Iterator[int]:
    """The process and its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from processes(int(child))


def memory(pid: int) -> tuple[int, int]:
    """Unique and resident bytes of a process and its descendants."""
    unique = resident = 0
    for each in processes(pid):
        rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        sizes = {name: int(kib) << 10 for name, kib in re.findall(r"(\w+): +(\d+) kB", rollup)}
        unique += sizes["Private_Clean"] + sizes["Private_Dirty"]
        resident += sizes["Rss"]
    return unique, resident


class Soak:
    """Clients that send requests and pause together."""

    def __init__(self, origin: str, pid: int, seed: int, rate: float | None) -> None:
        self._origin = origin
        self._pid = pid
        self._random = random.Random(seed)
        self._apart = 1 / rate if rate else 0.0
        self._next = self._began = time.monotonic()
        self.run = Run()

    async def during(self, seconds: float, clients: int, every: float) -> None:
        """Send traffic for ``seconds`` and fill in ``run``."""
        with Bar(total=round(seconds), unit=" s") as bar:
            await self._traffic(min(5.0, seconds), clients)  # connections, threads, caches
            while (passed := time.monotonic() - self._began) < seconds:
                await self._traffic(min(every, seconds - passed), clients)
                self.run.samples.append(await self._sample())
                bar.update(round(time.monotonic() - self._began) - bar.n)
                bar.set_postfix(
                    requests=self.run.counts.total(),
                    lost=len(self.run.unexpected),
                    refresh=False,
                )

    async def _traffic(self, seconds: float, clients: int) -> None:
        end = time.monotonic() + seconds
        # A new session each time: every pause closes the connections, which are reused in between.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            target = Target(session, self._origin, "soak", KEYS, ADMIN, ADAPTERS)
            await asyncio.gather(
                *(
                    self._client(target, random.Random(self._random.random()), end)
                    for _ in range(clients)
                )
            )

    async def _client(self, target: Target, rng: random.Random, end: float) -> None:
        kinds, weights = list(KINDS), list(KINDS.values())
        while await self._turn() < end:
            (kind,) = rng.choices(kinds, weights)
            try:
                outcome = await asyncio.wait_for(kind(target, rng), 120)
            except (Unexpected, aiohttp.ClientError, OSError, TimeoutError) as error:
                outcome = "unexpected"
                self.run.unexpected.append(f"{kind.__name__}: {error!r}")
            self.run.counts[f"{kind.__name__} {outcome}"] += 1

    async def _turn(self) -> float:
        """Wait until one more request may be sent, and return the time."""
        self._next = max(self._next + self._apart, time.monotonic())
        await asyncio.sleep(self._next - time.monotonic())
        return time.monotonic()

    async def _sample(self) -> Sample:
        async with aiohttp.ClientSession() as session:
            end = time.monotonic() + IDLE_SECONDS
            while True:
                async with session.get(self._origin + "/metrics") as response:
                    text = await response.text()
                found = dict(re.findall(r"^(nybble_\w+) (\S+)$", text, re.MULTILINE))
                sequences = int(
                    float(found["nybble_sequences_running"])
                    + float(found["nybble_sequences_waiting"])
                )
                if not sequences or time.monotonic() > end:
                    break
                await asyncio.sleep(0.1)
        usage = float(found["nybble_kv_cache_usage_ratio"])
        unique, resident = memory(self._pid)
        return Sample(
            round(time.monotonic() - self._began, 1),
            self.run.counts.total(),
            unique,
            resident,
            len(list(Path(f"/proc/{self._pid}/fd").iterdir())),
            len(list(Path(f"/proc/{self._pid}/task").iterdir())),
            int(float(found["nybble_event_loop_tasks"])),
            round(usage * float(found["nybble_kv_cache_blocks"])),
            sequences,
        )


def slope(samples: list[Sample]) -> float:
    """Bytes of memory a second: the median over all pairs of samples (Theil–Sen)."""
    pairs = [
        (b.uss - a.uss) / (b.seconds - a.seconds)
        for index, a in enumerate(samples)
        for b in samples[index + 1 :]
    ]
    return statistics.median(pairs)


def judge(run: Run) -> list[str]:
    """The criteria that the run failed; see the module's docstring."""
    broken = [f"{len(run.unexpected)} unexpected answers"] if run.unexpected else []
    leaked = [s for s in run.samples if s.kv_blocks or s.sequences]
    if leaked:
        broken.append(f"KV blocks or sequences left at {len(leaked)} pauses, first {leaked[0]}")
    duration = run.samples[-1].seconds
    warm = [s for s in run.samples if s.seconds >= WARM_UP * duration]
    if len(warm) < 3:
        return [*broken, "too short: fewer than three pauses after the warm-up"]
    growth = slope(warm) * (warm[-1].seconds - warm[0].seconds)
    allowed = max(MEMORY_BYTES, MEMORY_PART * statistics.median(s.uss for s in warm))
    if growth > allowed:
        broken.append(f"memory grew by {growth / 2**20:.1f} MiB, {allowed / 2**20:.1f} allowed")
    for name in ("files", "threads", "tasks"):
        first, last = getattr(warm[0], name), min(getattr(s, name) for s in warm[-3:])
        if last > first + SPARE:
            broken.append(f"{name}: {first} at first, {last} at the end")
    return broken


def plot(run: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    minutes = [s.seconds / 60 for s in run.samples]
    for name in ("uss", "rss"):
        axes[0].plot(minutes, [getattr(s, name) / 2**20 for s in run.samples], label=name.upper())
    axes[0].set(title="Memory at idle, MiB", ylim=(0, None))
    for name in ("files", "threads", "tasks", "kv_blocks"):
        axes[1].plot(minutes, [getattr(s, name) for s in run.samples], label=name.replace("_", " "))
    axes[1].set(title="Held at idle", ylim=(0, None))
    axes[2].plot(minutes, [s.requests for s in run.samples], label="requests")
    axes[2].set(title="Requests so far", ylim=(0, None))
    for axis in axes:
        axis.axvspan(0, minutes[-1] * WARM_UP, alpha=0.1)
        axis.set_xlabel("minutes")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    minutes: float = 30,
    model: Annotated[str, typer.Option(help="tiny, demo, a folder or hub name")] = "tiny",
    clients: int = 12,
    every: Annotated[float, typer.Option(help="seconds of traffic between pauses")] = 15,
    seed: int = 0,
    rate: Annotated[float | None, typer.Option(help="requests a second at most")] = None,
    out: Path = Path("soak.json"),
    plot_to: Path | None = None,
) -> None:
    with tempfile.TemporaryDirectory() as work:
        log = out.with_suffix(".log")
        with server(model, Path(work), log) as (pid, origin):
            soak = Soak(origin, pid, seed, rate)
            asyncio.run(soak.during(60 * minutes, clients, every))
    run = soak.run
    run.broken = judge(run)
    report: dict[str, Any] = {"minutes": minutes, "model": model, "clients": clients, "rate": rate}
    report |= {"broken": run.broken, "counts": dict(sorted(run.counts.items()))}
    report |= {"unexpected": run.unexpected, "samples": [asdict(s) for s in run.samples]}
    out.write_text(json.dumps(report, indent=1))
    for name, count in sorted(run.counts.items()):
        print(f"{name:<28} {count:>8}")
    first, last = run.samples[0], run.samples[-1]
    print(f"USS {first.uss / 2**20:.1f} → {last.uss / 2**20:.1f} MiB; {out}, {log}")
    for error, count in Counter(run.unexpected).most_common(10):
        print(f"{count} × {error}", file=sys.stderr)
    if plot_to is not None:
        plot(run, plot_to)
    for reason in run.broken:
        print(f"FAILED: {reason}", file=sys.stderr)
    if run.broken:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
