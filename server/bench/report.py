"""Percentiles, throughput and goodput, as a table, as JSON or as a plot."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.server.bench.client import Timing
from nybble.server.bench.drive import Run

LATENCIES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "mean inter-token latency of a request",
    "e2e": "whole request",
}
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def percentile(ordered: Sequence[float], q: float) -> float:
    """The ``q`` (0 to 100) percentile of sorted values, interpolated; NaN if there are none."""
    if not ordered:
        return float("nan")
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def latencies(timing: Timing) -> dict[str, list[float]]:
    """A request's latencies in milliseconds, by the names in LATENCIES; itl has one per gap."""
    gaps = [1e3 * gap for gap in timing.gaps]
    return {
        "ttft": [1e3 * timing.first],
        "itl": gaps,
        "tpot": [statistics.fmean(gaps)] if gaps else [],
        "e2e": [1e3 * timing.arrivals[-1]],
    }


def parse_slo(text: str) -> dict[str, float]:
    """The limits in milliseconds, by name, of a text such as ``ttft:500,tpot:50,e2e:5000``.

    Raises ValueError naming the part which is not of this form.
    """
    slo = {}
    for part in text.split(","):
        name, _, value = part.strip().partition(":")
        try:
            slo[name] = float(value)
        except ValueError:
            name = ""
        if name not in ("ttft", "tpot", "e2e"):
            raise ValueError(f"--slo {part!r}: expected ttft:MS, tpot:MS or e2e:MS")
    return slo


def summarize(run: Run, slo: Mapping[str, float]) -> dict[str, Any]:
    """What ``--json`` writes: latencies in milliseconds, and rates per second.

    slo: the limits in milliseconds within which a request counts for goodput.
    """
    good = [sent.timing for sent in run.sent if sent.timing.error is None and sent.timing.arrivals]
    failed = Counter(sent.timing.error or "no token came" for sent in run.sent)
    for timing in good:
        failed[timing.error or "no token came"] -= 1
    found = [latencies(timing) for timing in good]
    met = [
        each for each in found if all(value <= slo[name] for name in slo for value in each[name])
    ]
    summary: dict[str, Any] = {
        "requests": len(run.sent),
        "failed": sum(failed.values()),
        "errors": {error: count for error, count in failed.items() if count > 0},
        "seconds": run.seconds,
        "requests_per_second": len(good) / run.seconds,
        "prompt_tokens_per_second": sum(timing.prompt_tokens for timing in good) / run.seconds,
        "output_tokens_per_second": sum(timing.tokens for timing in good) / run.seconds,
        "latencies_ms": {},
    }
    if drafted := sum(timing.draft_tokens for timing in good):
        accepted = sum(timing.accepted_draft_tokens for timing in good)
        summary["draft_tokens_per_second"] = drafted / run.seconds
        summary["draft_acceptance_ratio"] = accepted / drafted
    for name in LATENCIES:
        values = sorted(value for each in found for value in each[name])
        summary["latencies_ms"][name] = {
            "mean": statistics.fmean(values) if values else float("nan"),
            **{label: percentile(values, q) for label, q in _QUANTILES.items()},
            "max": values[-1] if values else float("nan"),
        }
    if slo:
        summary["slo_ms"] = dict(slo)
        summary["goodput_requests_per_second"] = len(met) / run.seconds
        summary["slo_met_ratio"] = len(met) / len(run.sent) if run.sent else 0.0
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a text table."""
    lines = [
        f"{summary['requests']} requests in {summary['seconds']:.1f} s, {summary['failed']} failed",
        f"  {summary['requests_per_second']:.2f} requests/s, "
        f"{summary['output_tokens_per_second']:.1f} tokens/s generated, "
        f"{summary['prompt_tokens_per_second']:.1f} of prompts",
    ]
    if "draft_acceptance_ratio" in summary:
        lines.append(
            f"  {summary['draft_tokens_per_second']:.1f} draft tokens/s verified, "
            f"{summary['draft_acceptance_ratio']:.0%} accepted"
        )
    if "slo_ms" in summary:
        slo = ", ".join(f"{name} ≤ {value:g} ms" for name, value in summary["slo_ms"].items())
        lines.append(
            f"  goodput {summary['goodput_requests_per_second']:.2f} requests/s: "
            f"{summary['slo_met_ratio']:.0%} had {slo}"
        )
    names = ["mean", *_QUANTILES, "max"]
    lines.append(f"{'milliseconds':38}" + "".join(f"{name:>10}" for name in names))
    for name, about in LATENCIES.items():
        row = summary["latencies_ms"][name]
        lines.append(f"{about:38}" + "".join(f"{row[column]:>10.1f}" for column in names))
    lines += [f"  failed {count}×: {error}" for error, count in summary["errors"].items()]
    return "\n".join(lines)


def plot(run: Run, path: Path, title: str) -> None:
    """Draw the distributions of the latencies, and tokens per second over the run, to an image.

    Raises ModuleNotFoundError if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [sent for sent in run.sent if sent.timing.error is None and sent.timing.arrivals]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7))
    for axis, name in zip(axes.flat, ("ttft", "itl", "e2e"), strict=False):
        values = sorted(value for sent in good for value in latencies(sent.timing)[name])
        axis.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post")
        for q in (0.5, 0.99):
            if values:
                at = percentile(values, q)
                axis.axvline(at, color="grey", linestyle=":", linewidth=1)
                axis.annotate(f"p{100 * q:.0f} {at:.0f}", (at, 0.02), fontsize=8, rotation=90)
        axis.set(title=LATENCIES[name], xlabel="ms", ylabel="part of them", ylim=(0, 1.02))
        axis.set_xlim(left=0)
    arrivals = [sent.at + at for sent in good for at in sent.timing.arrivals]
    bins = max(1, min(120, int(run.seconds)))
    width = run.seconds / bins
    axes[1][1].hist(
        arrivals, bins=bins, range=(0, run.seconds), weights=[1 / width] * len(arrivals)
    )
    axes[1][1].set(title="events with tokens, a second", xlabel="s of the run")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
