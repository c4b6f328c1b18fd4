"""``nybble bench``: what is sent, when, and what is made of the answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from nybble.server.bench import report, workload
from nybble.server.bench.client import Client, Timing
from nybble.server.bench.drive import Run, Sent
from nybble.server.cli.main import app

from ..conftest import ServerProcess, running_server


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.mark.parametrize(("text", "low", "high"), [("9", 9, 9), ("3-5", 3, 5)])
def test_a_length_is_one_or_between_two(text: str, low: int, high: int) -> None:
    generator = random.Random(0)
    values = [workload.lengths(text)(generator) for _ in range(200)]
    assert (min(values), max(values)) == (low, high)


def test_a_length_may_be_exponential() -> None:
    generator = random.Random(0)
    values = [workload.lengths("~100")(generator) for _ in range(4000)]
    assert statistics.fmean(values) == pytest.approx(100, rel=0.1)
    assert statistics.stdev(values) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("text", ["0", "-1", "5-3", "~3-5", "many", ""])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="length"):
        workload.lengths(text)


def test_arrivals_are_poisson() -> None:
    times = list(itertools.islice(workload.poisson_arrivals(20, 1), 4001))
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.06)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.08)  # as the mean: exponential gaps


def test_random_prompts_differ_from_the_first_word_and_are_the_same_again() -> None:
    asks = workload.random_asks(50, "5-9", "3", 0)
    assert asks == workload.random_asks(50, "5-9", "3", 0)
    assert len({ask.prompt.split()[0] for ask in asks}) == 50


def test_a_dataset_is_prompts_or_sharegpt(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "x" * 40},
        {
            "conversations": [
                {"from": "human", "value": "b"},
                {"from": "gpt", "value": "y" * 80},
            ]
        },
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    asks = workload.dataset_asks(path, 4, None, 0)
    assert sorted((ask.prompt, ask.max_tokens) for ask in asks) == [
        *[("a", 10)] * 2,
        *[("b", 20)] * 2,
    ]
    assert {ask.max_tokens for ask in workload.dataset_asks(path, 4, "7", 0)} == {7}
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        workload.dataset_asks(path, 4, None, 0)


def timing(first: float, gap: float, tokens: int) -> Timing:
    return Timing([first + gap * i for i in range(tokens)], 10, tokens)


def test_percentiles_are_numpys() -> None:
    values = sorted(random.Random(0).random() for _ in range(37))
    for q in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert report.percentile(values, q) == pytest.approx(np.quantile(values, q))
    assert math.isnan(report.percentile([], 0.5))


def test_the_summary_counts_what_met_the_slo() -> None:
    sent = [
        Sent(0.0, timing(0.1, 0.01, 11)),
        Sent(0.5, timing(0.9, 0.01, 11)),  # late first token
        Sent(0.6, timing(0.1, 0.20, 11)),  # slow tokens
        Sent(0.7, Timing((), error="503: full")),
        Sent(0.8, Timing((), 10, 0)),  # ended without a token
    ]
    found = report.summarize(Run(sent, 2.0), report.parse_slo("ttft:500, tpot:50"))
    assert (found["requests"], found["failed"]) == (5, 2)
    assert found["errors"] == {"503: full": 1, "no token came": 1}
    assert found["output_tokens_per_second"] == pytest.approx(33 / 2)
    assert found["goodput_requests_per_second"] == pytest.approx(0.5)
    assert found["slo_met_ratio"] == pytest.approx(1 / 5)
    assert found["latencies_ms"]["ttft"]["max"] == pytest.approx(900)
    assert found["latencies_ms"]["itl"]["p50"] == pytest.approx(10)
    assert found["latencies_ms"]["e2e"]["max"] == pytest.approx(2100)
    assert "20% had ttft ≤ 500 ms" in report.table(found)
    with pytest.raises(ValueError, match="--slo"):
        report.parse_slo("ttft=5")


def test_the_summary_says_which_part_of_drafts_was_accepted() -> None:
    with_drafts = replace(timing(0.1, 0.01, 11), draft_tokens=20, accepted_draft_tokens=8)
    found = report.summarize(
        Run([Sent(0.0, with_drafts), Sent(0.1, timing(0.1, 0.01, 11))], 2.0), {}
    )
    assert found["draft_acceptance_ratio"] == pytest.approx(0.4)
    assert "10.0 draft tokens/s verified, 40% accepted" in report.table(found)
    assert "draft" not in report.table(report.summarize(Run([Sent(0, timing(1, 1, 2))], 2.0), {}))


def test_a_server_with_drafts_tells_the_benchmark(tiny_model: Callable[..., Path]) -> None:
    draft = ("--draft-model", str(tiny_model()), "--speculate", "draft")
    with running_server(tiny_model(), *draft) as process:
        result = bench(
            *("--url", process.url + "/v1", "--concurrency", 2, "--requests", 4),
            *("--prompt-words", "2-4", "--max-tokens", 8),
        )
    assert result.exit_code == 0, result.output
    assert re.search(r"[\d.]+ draft tokens/s verified, \d+% accepted", result.stdout)


@pytest.mark.parametrize("load", [("--concurrency", 3), ("--rate", 50)])
def test_a_server_is_measured(server: ServerProcess, tmp_path: Path, load: tuple[str, int]) -> None:
    out, image = tmp_path / "out.json", tmp_path / "out.png"
    result = bench(
        *("--url", server.url + "/v1", *load, "--requests", 6, "--prompt-words", "2-4"),
        *("--max-tokens", "3-5", "--slo", "e2e:600000", "--json", out, "--plot", image),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["requests"], found["failed"], found["model"]) == (6, 0, "tiny")
    assert found["slo_met_ratio"] == 1
    tokens = found["output_tokens_per_second"] * found["seconds"]
    assert 18 <= round(tokens) <= 30
    for latency in found["latencies_ms"].values():
        assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "tokens/s generated" in result.stdout


def test_a_chunk_that_only_ends_the_stream_is_no_token(server: ServerProcess) -> None:
    async def measured() -> Timing:
        async with aiohttp.ClientSession() as session:
            return await Client(session, server.url + "/v1", "tiny").complete("the moon", 6)

    timing = asyncio.run(measured())
    assert timing.tokens == 6
    assert 1 <= len(timing.arrivals) <= 6


def test_a_client_sends_further_fields(server: ServerProcess) -> None:
    async def measured() -> Timing:
        async with aiohttp.ClientSession() as session:
            client = Client(session, server.url + "/v1", "tiny", extra={"max_tokens": 3})
            return await client.complete("the moon", 6)

    assert asyncio.run(measured()).tokens == 3


def test_failures_are_counted_named_and_the_exit_code(server: ServerProcess) -> None:
    options = ("--url", server.url + "/v1", "--requests", 2, "--prompt-words", 3)
    result = bench(*options, "--max-tokens", 10**6)
    assert result.exit_code == 1
    assert "2 failed" in result.stdout
    assert "×: 400: " in result.stdout
    result = bench("--url", "http://127.0.0.1:9/v1", "--requests", 1)
    assert result.exit_code == 1
    assert "error: http://127.0.0.1:9/v1 does not list its models" in result.stderr
    assert "exclude" in bench("--rate", 1, "--concurrency", 1).stderr
