"""Prometheus metrics: what the engine counts, and how long requests took."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version

from aiohttp import hdrs
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from nybble.engine import Engine, Request
from nybble.engine.stats import SizeCounts
from nybble.server.tenancy.admission import Admission

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SECONDS = (*_TOKEN_SECONDS, 5, 10, 30, 60, 120, 300)
# The most values of a label that have a time series of their own at a time.
_LABELS = 50
_OTHER = "other"
# How often these values are chosen again, and how much busier a value must be to replace another.
_WINDOW_SECONDS = 600.0
_BUSIER = 2
_METHODS = frozenset(hdrs.METH_ALL)
# Error causes whose series exist from the start: refusals, and others that alerts need.
_CAUSES = (
    *("overloaded", "tenant_overloaded", "queue_too_long", "rate_limit_exceeded"),
    *("internal_error", "engine_unavailable", "timeout"),
)
_TOKENS = tuple(1 << i for i in range(18))  # up to contexts of 131,072
# Buckets of a step's sizes, as powers of two: 1,024 sequences and 16,384 tokens.
_STEP_SEQUENCES, _STEP_TOKENS, _ACCEPTED_LENGTH = 11, 15, 6


class Metrics:
    """The metrics of one server, in a registry of their own.

    admission: the source of the sequence limit and the predicted wait.
    """

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self._registry)
        Gauge(
            "nybble_sequences_limit",
            "Sequences that may be running and waiting at once; more are refused.",
            registry=self._registry,
        ).set(admission.capacity.sequences)
        Gauge(
            "nybble_predicted_wait_seconds",
            "Until what is in flight could all be computed at once, at the rate observed.",
            registry=self._registry,
        ).set_function(lambda: admission.predicted_wait)

        self.event_loop_tasks = Gauge(
            "nybble_event_loop_tasks",
            "Tasks of the server's event loop: a few for each connection and request.",
            registry=self._registry,
        )

        def histogram(name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, about, buckets=buckets, registry=self._registry)

        self.time_to_first_token = histogram(
            "nybble_time_to_first_token_seconds", "From a sequence's arrival to its first token."
        )
        self.inter_token_latency = histogram(
            "nybble_inter_token_latency_seconds",
            "Between two tokens of a sequence.",
            _TOKEN_SECONDS,
        )
        self.e2e_latency = histogram(
            "nybble_e2e_request_latency_seconds", "From a sequence's arrival to its last token."
        )
        self.queue_time = histogram(
            "nybble_request_queue_seconds", "From a sequence's arrival to its first computation."
        )
        self.prefill_time = histogram(
            "nybble_request_prefill_seconds",
            "From a sequence's first computation to its first token.",
        )
        self.decode_time = histogram(
            "nybble_request_decode_seconds", "From a sequence's first token to its last."
        )
        self.inference_time = histogram(
            "nybble_request_inference_seconds",
            "From a sequence's first computation to its last token.",
        )
        self.time_per_output_token = histogram(
            "nybble_request_time_per_output_token_seconds",
            "Mean time between two tokens, one value per sequence.",
            _TOKEN_SECONDS,
        )
        self._prompt_tokens = histogram(
            "nybble_request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS
        )
        self._max_tokens = histogram(
            "nybble_request_max_tokens",
            "Tokens a sequence may generate, where the request says so.",
            _TOKENS,
        )
        self.output_tokens = histogram(
            "nybble_request_generation_tokens", "Tokens a finished sequence generated.", _TOKENS
        )
        self.finished = Counter(
            "nybble_sequences_finished",
            "Sequences ended, by reason: stop, length, cancelled or error.",
            ["reason"],
            registry=self._registry,
        )
        # Create the series at 0: Prometheus' rate() cannot see a series' first increment.
        for reason in ("stop", "length", "cancelled", "error"):
            self.finished.labels(reason)
        self._http_requests = Counter(
            "nybble_http_requests",
            "HTTP requests answered, by route and status (499: the client went away).",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._http_seconds = Histogram(
            "nybble_http_request_duration_seconds",
            "From an HTTP request's headers to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._errors = Counter(
            "nybble_request_errors",
            "Requests that ended with an error, by its code, streams cut short among them.",
            ["cause"],
            registry=self._registry,
        )
        for cause in _CAUSES:
            self._errors.labels(cause)
        self._by_adapter = _Shares("adapter", self._registry)
        self._by_tenant = _Shares("tenant", self._registry)

    def answered(
        self, method: str, route: str, status: int, seconds: float, cause: str | None
    ) -> None:
        """Count an HTTP request.

        route: its path pattern.
        cause: of the error it ended with; None if there was none.
        """
        known = method if method in _METHODS else _OTHER  # clients may send any word
        self._http_requests.labels(known, route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)
        if cause is not None:
            self._errors.labels(cause).inc()

    def begin(self, request: Request) -> None:
        """Count a sequence, also for its adapter and tenant."""
        self._prompt_tokens.observe(len(request.prompt_token_ids))
        if request.params.max_tokens is not None:
            self._max_tokens.observe(request.params.max_tokens)
        self._by_adapter.begin(request.adapter)
        self._by_tenant.begin(request.tenant)

    def generated(self, request: Request, tokens: int) -> None:
        """Count generated tokens for a sequence's adapter and tenant."""
        self._by_adapter.generated(request.adapter, tokens)
        self._by_tenant.generated(request.tenant, tokens)

    def register(self, collector: Collector) -> None:
        """Add another collector's metrics."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._registry)


class _Shares:
    """Counts sequences and tokens by a label with unknown values, in a bounded number of series.

    The first ``_LABELS`` names have series of their own; the others share one. After every window
    the busiest of the others replace the least busy. A series that ended may start again from 0,
    which Prometheus treats as a counter reset.
    """

    def __init__(
        self, kind: str, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        def counter(what: str, about: str) -> Counter:
            return Counter(
                f"nybble_{kind}_{what}",
                f"{about} by {kind}: the {_LABELS} busiest, and '{_OTHER}'.",
                [kind],
                registry=registry,
            )

        self._sequences = counter("sequences", "Sequences")
        self._tokens = counter("generation_tokens", "Tokens generated")
        self._labels: set[str] = set()
        self._clock = clock
        self._window_ends = clock() + _WINDOW_SECONDS
        self._sequences_in_window: collections.Counter[str] = collections.Counter()

    def begin(self, name: str | None) -> None:
        if not name:
            return
        if self._clock() >= self._window_ends:
            self._choose()
        self._sequences_in_window[name] += 1
        if len(self._labels) < _LABELS:
            self._labels.add(name)
        self._sequences.labels(self._label(name)).inc()

    def generated(self, name: str | None, tokens: int) -> None:
        if name:
            self._tokens.labels(self._label(name)).inc(tokens)

    def _label(self, name: str) -> str:
        return name if name in self._labels else _OTHER

    def _choose(self) -> None:
        """Give the labels of the least busy names to busier ones, and start a new window."""
        busy = self._sequences_in_window
        newcomers = [name for name, _ in busy.most_common() if name not in self._labels]
        for name, least in zip(newcomers, sorted(self._labels, key=busy.__getitem__), strict=False):
            if busy[name] <= _BUSIER * busy[least]:
                break
            self._labels.remove(least)
            self._labels.add(name)
            for counter in (self._sequences, self._tokens):
                with suppress(KeyError):  # it has no series yet
                    counter.remove(least)
        self._sequences_in_window = collections.Counter()
        self._window_ends = self._clock() + _WINDOW_SECONDS


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        used = stats.kv_blocks_total - stats.kv_blocks_free
        gauges = {
            "nybble_sequences_running": ("Sequences being computed.", stats.running),
            "nybble_sequences_waiting": ("Sequences waiting to be computed.", stats.waiting),
            "nybble_kv_cache_blocks": ("Blocks in the KV cache.", stats.kv_blocks_total),
            "nybble_kv_cache_usage_ratio": (
                "Part of the KV cache's blocks held by sequences, 0 to 1.",
                used / stats.kv_blocks_total,
            ),
            "nybble_engine_healthy": ("1 while the engine takes requests.", self._engine.healthy),
        }
        counters = {
            "nybble_prompt_tokens": ("Prompt tokens computed.", stats.prompt_tokens),
            "nybble_generation_tokens": ("Tokens generated.", stats.generation_tokens),
            "nybble_prefix_cache_query_tokens": (
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_query_tokens,
            ),
            "nybble_prefix_cache_hit_tokens": (
                "Prompt tokens found in the prefix cache.",
                stats.prefix_hit_tokens,
            ),
            "nybble_preemptions": (
                "Sequences sent back to wait for KV blocks.",
                stats.preemptions,
            ),
            "nybble_draft_tokens": ("Draft tokens verified.", stats.draft_tokens),
            "nybble_accepted_draft_tokens": (
                "Draft tokens that were what the model says.",
                stats.accepted_tokens,
            ),
            "nybble_engine_failures": ("Failures of the engine.", stats.failures),
            "nybble_engine_restarts": ("Times the engine began again.", stats.restarts),
            "nybble_engine_steps": ("Steps of the engine.", stats.steps),
            "nybble_engine_step_seconds": (
                "Time spent in steps: its rate is the part of the time the engine is busy.",
                stats.step_seconds,
            ),
        }
        adapters = collections.Counter(info.residency for info in self._engine.adapters())
        residency = GaugeMetricFamily(
            "nybble_adapters", "Loaded adapters by the fastest memory they are in.", labels=["in"]
        )
        for place in ("device", "host", "disk"):
            residency.add_metric([place], adapters[place])
        yield residency
        yield InfoMetricFamily(
            "nybble_build", "The server's version.", value={"version": version("nybble")}
        )
        yield _sizes(
            "nybble_engine_step_sequences",
            "Sequences computed in a step: the batch's size.",
            stats.step_sequences,
            _STEP_SEQUENCES,
        )
        yield _sizes(
            "nybble_engine_step_tokens",
            "Tokens computed in a step, of prompts and outputs.",
            stats.step_tokens,
            _STEP_TOKENS,
        )
        yield _sizes(
            "nybble_draft_accepted_length",
            "Tokens that a verified draft brought, the one sampled after it included.",
            stats.accepted_of_draft,
            _ACCEPTED_LENGTH,
        )
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(name, about, value=float(value))
        for name, (about, value) in counters.items():
            yield CounterMetricFamily(name, about, value=float(value))


def _sizes(name: str, about: str, sizes: SizeCounts, buckets: int) -> HistogramMetricFamily:
    """A histogram with ``buckets`` buckets and the one up to infinity."""
    cumulative = list(itertools.accumulate(sizes.counts)) or [0]
    shown = [
        (str(float(1 << i)), float(cumulative[min(i, len(cumulative) - 1)])) for i in range(buckets)
    ]
    return HistogramMetricFamily(
        name, about, buckets=[*shown, ("+Inf", float(cumulative[-1]))], sum_value=float(sizes.total)
    )
