"""This server beside llama.cpp, with the same model, prompts and threads, alternating in one run.

    python load_tests/compare_llama_cpp.py

llama.cpp (``llama-cpp-python``, built from source into an environment of its own under the cache)
runs the demo model's GGUF file, Q4_K_M, without HTTP. This server runs the same model with 4-bit
weights and an 8-bit output layer (llama.cpp's is Q8_0), and is measured over HTTP. Every round
measures llama.cpp with one stream, this server with one, and this server with several.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nybble.kernels.progress import Bar
from nybble.loaders import resolve_model
from nybble.loaders.cache import cache_folder
from nybble.loaders.demo import demo_gguf
from nybble.server.bench.client import Client, Timing
from nybble.server.bench.workload import random_prompt as prompt

LLAMA_CPP = "llama-cpp-python==0.3.36"
PORT = 8123


def llama_python() -> Path:
    """The Python of an environment with llama.cpp, which is built on first use (in minutes)."""
    folder = cache_folder() / LLAMA_CPP.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "built").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", LLAMA_CPP], check=True)
        (folder / "built").touch()
    return python


class LlamaCpp:
    def __init__(self, gguf: Path, threads: int) -> None:
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        self._process = subprocess.Popen(
            [llama_python(), worker, gguf, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self) -> dict[str, list[float]]:
        assert self._process.stdout is not None
        answer: dict[str, list[float]] = json.loads(self._process.stdout.readline())
        return answer

    def complete(self, ids: list[int], max_tokens: int) -> Timing:
        assert self._process.stdin is not None
        print(
            json.dumps({"prompt": ids, "max_tokens": max_tokens}),
            file=self._process.stdin,
            flush=True,
        )
        arrivals = self._answer()["arrivals"]
        return Timing(arrivals, len(ids), len(arrivals))

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def decode_rate(timings: list[Timing]) -> float:
    """Tokens per second of all streams together, after each has received its first token."""
    span = max(t.arrivals[-1] for t in timings) - max(t.first for t in timings)
    after = sum(sum(at > max(t.first for t in timings) for at in t.arrivals) for t in timings)
    return after / span


def whole_rate(timings: list[Timing]) -> float:
    """Tokens per second of all streams together; the time includes that of the prompts."""
    return sum(t.tokens for t in timings) / max(t.arrivals[-1] for t in timings)


async def compare(
    server_url: str,
    tokenizer: PreTrainedTokenizerBase,
    llama: LlamaCpp,
    rounds: int,
    streams: int,
    sizes: tuple[int, int],
) -> dict[str, list[float]]:
    words, max_tokens = sizes
    seeds = iter(range(1000, 10**6))

    def ids() -> list[int]:
        return list(tokenizer(prompt(words, next(seeds)))["input_ids"])

    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        async with session.get(f"{server_url}/models") as response:
            client = Client(session, server_url, (await response.json())["data"][0]["id"])
        for measured in Bar([False] + [True] * rounds, desc="Rounds (the first is a warm-up)"):
            theirs = [await asyncio.to_thread(llama.complete, ids(), max_tokens)]
            ours = [await client.complete(ids(), max_tokens)]
            many = await asyncio.gather(
                *(client.complete(ids(), max_tokens) for _ in range(streams))
            )
            for timing in (*ours, *many):
                if timing.error:
                    raise SystemExit(f"this server failed: {timing.error}")
            if measured:
                for name, timings in (("llama.cpp, 1 stream", theirs), ("nybble, 1 stream", ours)):
                    note(f"{name}: prompt tok/s", timings[0].prompt_tokens / timings[0].first)
                    note(f"{name}: decode tok/s", decode_rate(timings))
                    note(f"{name}: tok/s in all", whole_rate(timings))
                note(f"nybble, {streams} streams: decode tok/s", decode_rate(list(many)))
                note(f"nybble, {streams} streams: tok/s in all", whole_rate(list(many)))
    return figures


def report(figures: dict[str, list[float]], streams: int) -> None:
    for name, values in figures.items():
        print(
            f"{name:<40} {statistics.median(values):8.1f}   ({min(values):.1f}–{max(values):.1f})"
        )
    print("\nRatios to llama.cpp's one stream, round by round (median, min–max)")
    for ours, theirs in (
        ("nybble, 1 stream: prompt tok/s", "llama.cpp, 1 stream: prompt tok/s"),
        ("nybble, 1 stream: decode tok/s", "llama.cpp, 1 stream: decode tok/s"),
        (f"nybble, {streams} streams: decode tok/s", "llama.cpp, 1 stream: decode tok/s"),
        (f"nybble, {streams} streams: tok/s in all", "llama.cpp, 1 stream: tok/s in all"),
    ):
        ratios = [a / b for a, b in zip(figures[ours], figures[theirs], strict=True)]
        print(
            f"{ours:<40} {statistics.median(ratios):8.2f}   ({min(ratios):.2f}–{max(ratios):.2f})"
        )


def main(
    rounds: int = 5,
    streams: int = 8,
    prompt_words: int = 200,
    max_tokens: int = 64,
    threads: Annotated[int, typer.Option(help="of both")] = os.cpu_count() or 1,
    model: Annotated[str, typer.Option(help="a folder with the demo model, or its name")] = "demo",
) -> None:
    """Measure both; the server is started and stopped here."""
    gguf = demo_gguf(cache_folder() / "models" / "demo.gguf")
    llama = LlamaCpp(gguf, threads)
    serve = Path(sys.executable).with_name("serve")
    command: list[str | Path] = [serve, "--model", model, "--port", str(PORT)]
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    url = f"http://127.0.0.1:{PORT}"
    try:
        asyncio.run(wait_until_healthy(url, server))
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
        sizes = (prompt_words, max_tokens)
        figures = asyncio.run(compare(f"{url}/v1", tokenizer, llama, rounds, streams, sizes))
        report(figures, streams)
    finally:
        server.terminate()
        server.wait()
        llama.stop()


async def wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return once ``/health`` reports ok. Raises SystemExit if the server ends first."""
    async with aiohttp.ClientSession() as session:
        while server.poll() is None:
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    raise SystemExit(f"the server ended with code {server.returncode}")


if __name__ == "__main__":
    typer.run(main)
