"""Prometheus metrics: what the engine counts, and how long requests took."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version

from aiohttp import hdrs
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

from nybble.engine import Engine, Request
from nybble.engine.stats import EngineStats, SizeCounts
from nybble.server.observability.exposition import (
    CounterSeries,
    Family,
    HistogramSeries,
    Kind,
    buckets,
    counter,
    header,
    histogram,
    histogram_lines,
    labelled,
    number,
)
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
    """The metrics of one server. A scrape is cheap, and whatever it says is of that moment.

    event_loop_tasks: tasks of the server's event loop.
    """

    def __init__(
        self, engine: Engine, admission: Admission, vllm_model_name: str | None = None
    ) -> None:
        """admission: the source of the sequence limit and the predicted wait.

        vllm_model_name: write what routers ask for under vLLM's names too, with this model's name.
        """
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._engine = _EngineMetrics(engine)
        self._vllm = None if vllm_model_name is None else _VllmMetrics(engine, vllm_model_name)
        self._admission = admission
        self.event_loop_tasks = 0
        self._families: list[Family[CounterSeries] | Family[HistogramSeries]] = []

        def histograms(
            name: str, about: str, buckets: tuple[float, ...] = _SECONDS
        ) -> HistogramSeries:
            family = histogram(name, about, buckets)
            self._families.append(family)
            return family.labels()

        self.time_to_first_token = histograms(
            "nybble_time_to_first_token_seconds", "From a sequence's arrival to its first token."
        )
        self.inter_token_latency = histograms(
            "nybble_inter_token_latency_seconds",
            "Between two tokens of a sequence.",
            _TOKEN_SECONDS,
        )
        self.e2e_latency = histograms(
            "nybble_e2e_request_latency_seconds", "From a sequence's arrival to its last token."
        )
        self.queue_time = histograms(
            "nybble_request_queue_seconds", "From a sequence's arrival to its first computation."
        )
        self.prefill_time = histograms(
            "nybble_request_prefill_seconds",
            "From a sequence's first computation to its first token.",
        )
        self.decode_time = histograms(
            "nybble_request_decode_seconds", "From a sequence's first token to its last."
        )
        self.inference_time = histograms(
            "nybble_request_inference_seconds",
            "From a sequence's first computation to its last token.",
        )
        self.time_per_output_token = histograms(
            "nybble_request_time_per_output_token_seconds",
            "Mean time between two tokens, one value per sequence.",
            _TOKEN_SECONDS,
        )
        self._prompt_tokens = histograms(
            "nybble_request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS
        )
        self._max_tokens = histograms(
            "nybble_request_max_tokens",
            "Tokens a sequence may generate, where the request says so.",
            _TOKENS,
        )
        self.output_tokens = histograms(
            "nybble_request_generation_tokens", "Tokens a finished sequence generated.", _TOKENS
        )
        self.finished = counter(
            "nybble_sequences_finished",
            "Sequences ended, by reason: stop, length, cancelled or error.",
            ["reason"],
        )
        # Create the series at 0: Prometheus' rate() cannot see a series' first increment.
        for reason in ("stop", "length", "cancelled", "error"):
            self.finished.labels(reason)
        self._http_requests = counter(
            "nybble_http_requests",
            "HTTP requests answered, by route and status (499: the client went away).",
            ["method", "route", "status"],
        )
        self._http_seconds = histogram(
            "nybble_http_request_duration_seconds",
            "From an HTTP request's headers to the end of its answer.",
            _SECONDS,
            ["route"],
        )
        self._errors = counter(
            "nybble_request_errors",
            "Requests that ended with an error, by its code, streams cut short among them.",
            ["cause"],
        )
        for cause in _CAUSES:
            self._errors.labels(cause)
        self._by_adapter = _Shares("adapter")
        self._by_tenant = _Shares("tenant", method=engine.draft_method)
        self._families += [self.finished, self._http_requests, self._http_seconds, self._errors]
        self._families += [*self._by_adapter.families, *self._by_tenant.families]

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

    def drafted(self, request: Request, tokens: int, accepted: int) -> None:
        """Count a draft that was verified for a sequence's tenant."""
        self._by_tenant.drafted(request.tenant, tokens, accepted)

    def register(self, collector: Collector) -> None:
        """Add another collector's metrics."""
        self._registry.register(collector)

    def add(self, families: Iterable[Family[CounterSeries]]) -> None:
        """Add another part's counters, which the event loop counts."""
        self._families += families

    def render(self) -> bytes:
        """The exposition in Prometheus' text format."""
        lines = [*self._engine.write(), *self._write_server()]
        if self._vllm is not None:
            lines += self._vllm.write()
        for family in self._families:
            lines += family.write()
        return "".join(lines).encode() + generate_latest(self._registry)

    def _write_server(self) -> Iterator[str]:
        values = (
            self._admission.capacity.sequences,
            self._admission.predicted_wait,
            self.event_loop_tasks,
        )
        for line, value in zip(_SERVER_LINES, values, strict=True):
            yield f"{line} {number(value)}\n"


class _Shares:
    """Counts sequences and tokens by a label with unknown values, in a bounded number of series.

    The first ``_LABELS`` names have series of their own; the others share one. After every window
    the busiest of the others replace the least busy. A series that ended may start again from 0,
    which Prometheus treats as a counter reset.
    """

    def __init__(
        self,
        kind: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        method: str | None = None,
    ) -> None:
        """method: by what tokens are drafted, if drafts are counted too."""
        busiest = f"by {kind}: the {_LABELS} busiest, and '{_OTHER}'."

        def shares(what: str, about: str, *labels: str) -> Family[CounterSeries]:
            return counter(f"nybble_{kind}_{what}", f"{about} {busiest}", [kind, *labels])

        self._sequences = shares("sequences", "Sequences")
        self._tokens = shares("generation_tokens", "Tokens generated")
        self.families: list[Family[CounterSeries] | Family[HistogramSeries]]
        self.families = [self._sequences, self._tokens]
        self._method = method
        if method is not None:
            self._drafted = shares("draft_tokens", "Draft tokens verified", "method")
            self._accepted = shares(
                "accepted_draft_tokens", "Draft tokens that were what the model says", "method"
            )
            self._accepted_length = histogram(
                f"nybble_{kind}_draft_accepted_length",
                "Tokens that a verified draft brought, the one sampled after it included, "
                + busiest,
                [1 << i for i in range(_ACCEPTED_LENGTH)],
                [kind, "method"],
            )
            self.families += [self._drafted, self._accepted, self._accepted_length]
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

    def drafted(self, name: str | None, tokens: int, accepted: int) -> None:
        """Count a draft that was verified."""
        if name and self._method is not None:
            labels = self._label(name), self._method
            self._drafted.labels(*labels).inc(tokens)
            self._accepted.labels(*labels).inc(accepted)
            self._accepted_length.labels(*labels).observe(accepted + 1)

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
            for family in self.families:
                family.remove(least)
        self._sequences_in_window = collections.Counter()
        self._window_ends = self._clock() + _WINDOW_SECONDS


def _line(name: str, kind: Kind, about: str) -> str:
    """A family of one series without labels, up to its value."""
    return header(name, kind, about) + name


_SERVER_LINES = (
    _line(
        "nybble_sequences_limit",
        "gauge",
        "Sequences that may be running and waiting at once; more are refused.",
    ),
    _line(
        "nybble_predicted_wait_seconds",
        "gauge",
        "Until what is in flight could all be computed at once, at the rate observed.",
    ),
    _line(
        "nybble_event_loop_tasks",
        "gauge",
        "Tasks of the server's event loop: a few for each connection and request.",
    ),
)


def _kv_cache_usage(stats: EngineStats) -> float:
    return (stats.kv_blocks_total - stats.kv_blocks_free) / stats.kv_blocks_total


_Read = Callable[[EngineStats], float]
_GAUGES: Mapping[str, tuple[str, _Read]] = {
    "nybble_sequences_running": ("Sequences being computed.", lambda s: s.running),
    "nybble_sequences_waiting": ("Sequences waiting to be computed.", lambda s: s.waiting),
    "nybble_kv_cache_blocks": ("Blocks in the KV cache.", lambda s: s.kv_blocks_total),
    "nybble_kv_cache_usage_ratio": (
        "Part of the KV cache's blocks held by sequences, 0 to 1.",
        _kv_cache_usage,
    ),
    "nybble_state_slots": (
        "Slots for the states of layers without attention; 0 if the model has none.",
        lambda s: s.state_slots_total,
    ),
    "nybble_state_slots_held": (
        "Slots for states held by sequences.",
        lambda s: s.state_slots_held,
    ),
    "nybble_state_snapshots": (
        "Slots with states that the prefix cache keeps.",
        lambda s: s.state_snapshots,
    ),
}
_COUNTERS: Mapping[str, tuple[str, _Read]] = {
    "nybble_prompt_tokens": ("Prompt tokens computed.", lambda s: s.prompt_tokens),
    "nybble_generation_tokens": ("Tokens generated.", lambda s: s.generation_tokens),
    "nybble_prefix_cache_query_tokens": (
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_query_tokens,
    ),
    "nybble_prefix_cache_hit_tokens": (
        "Prompt tokens found in the prefix cache.",
        lambda s: s.prefix_hit_tokens,
    ),
    "nybble_preemptions": (
        "Sequences sent back to wait for KV blocks.",
        lambda s: s.preemptions,
    ),
    "nybble_engine_failures": ("Failures of the engine.", lambda s: s.failures),
    "nybble_engine_restarts": ("Times the engine began again.", lambda s: s.restarts),
    "nybble_engine_steps": ("Steps of the engine.", lambda s: s.steps),
    "nybble_engine_step_seconds": (
        "Time spent in steps: its rate is the part of the time the engine is busy.",
        lambda s: s.step_seconds,
    ),
}
_OF_STATS = tuple(
    [(_line(name, "gauge", about), read) for name, (about, read) in _GAUGES.items()]
    + [
        (_line(f"{name}_total", "counter", about), read)
        for name, (about, read) in _COUNTERS.items()
    ]
)


_DRAFTS: Mapping[str, tuple[str, _Read]] = {
    "nybble_draft_tokens": ("Draft tokens verified.", lambda s: s.draft_tokens),
    "nybble_accepted_draft_tokens": (
        "Draft tokens that were what the model says.",
        lambda s: s.accepted_tokens,
    ),
}


class _EngineMetrics:
    """What the engine counts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._healthy = _line(
            "nybble_engine_healthy", "gauge", "1 while the engine takes requests."
        )
        self._constant = (
            header("nybble_build_info", "gauge", "The server's version.")
            + labelled("nybble_build_info", {"version": version("nybble")})
            + " 1.0\n"
            + _line("nybble_kv_cache_block_tokens", "gauge", "Tokens in a block of the KV cache.")
            + f" {number(engine.kv_block_size)}\n"
        )
        self._adapters_header = header(
            "nybble_adapters", "gauge", "Loaded adapters by the fastest memory they are in."
        )
        self._step_sequences = _Sizes(
            "nybble_engine_step_sequences",
            "Sequences computed in a step: the batch's size.",
            _STEP_SEQUENCES,
        )
        self._step_tokens = _Sizes(
            "nybble_engine_step_tokens",
            "Tokens computed in a step, of prompts and outputs.",
            _STEP_TOKENS,
        )
        # The series exist without drafts too: see Metrics.finished.
        method = {"method": engine.draft_method or "none"}
        self._accepted_length = _Sizes(
            "nybble_draft_accepted_length",
            "Tokens that a verified draft brought, the one sampled after it included.",
            _ACCEPTED_LENGTH,
            method,
        )
        self._drafts = [
            (header(f"{name}_total", "counter", about) + labelled(f"{name}_total", method), read)
            for name, (about, read) in _DRAFTS.items()
        ]

    def write(self) -> Iterator[str]:
        stats = self._engine.stats()
        for line, read in (*_OF_STATS, *self._drafts):
            yield f"{line} {number(read(stats))}\n"
        yield f"{self._healthy} {number(self._engine.healthy)}\n"
        yield self._constant
        yield self._adapters_header
        usage = self._engine.adapter_usage()
        for place, count in (("device", usage.device), ("host", usage.host), ("disk", usage.disk)):
            yield f'nybble_adapters{{in="{place}"}} {number(count)}\n'
        yield from self._step_sequences.write(stats.step_sequences)
        yield from self._step_tokens.write(stats.step_tokens)
        yield from self._accepted_length.write(stats.accepted_of_draft)


class _VllmMetrics:
    """What the model server protocol of the Gateway API inference extension asks, as vLLM names it.

    Source: https://github.com/kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003.
    The names of adapters are label values, so that every change of the slots begins a time series
    in Prometheus: one reason why this is off by default.
    """

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        labels = {"model_name": model_name}

        def gauge(name: str, about: str) -> str:
            return header(name, "gauge", about) + labelled(name, labels)

        self._lines: tuple[tuple[str, _Read], ...] = (
            (
                gauge("vllm:num_requests_running", "Sequences being computed."),
                lambda s: s.running,
            ),
            (
                gauge("vllm:num_requests_waiting", "Sequences waiting to be computed."),
                lambda s: s.waiting,
            ),
            (
                gauge("vllm:kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1."),
                _kv_cache_usage,
            ),
        )
        self._lora_header = header(
            "vllm:lora_requests_info",
            "gauge",
            "Adapters in a slot, and those that requests wait for; the value is the time.",
        )

    def write(self) -> Iterator[str]:
        stats = self._engine.stats()
        for line, read in self._lines:
            yield f"{line} {number(read(stats))}\n"
        name = "vllm:cache_config_info"
        cache = {
            "block_size": str(self._engine.kv_block_size),
            "num_gpu_blocks": str(stats.kv_blocks_total),
        }
        yield header(name, "gauge", "The KV cache: tokens in a block, and blocks.")
        yield f"{labelled(name, cache)} 1.0\n"
        usage = self._engine.adapter_usage()
        if usage.slots:
            adapters = {
                "max_lora": str(usage.slots),
                "running_lora_adapters": ",".join(usage.in_slots),
                "waiting_lora_adapters": ",".join(usage.waiting),
            }
            yield self._lora_header
            yield f"{labelled('vllm:lora_requests_info', adapters)} {number(time.time())}\n"


class _Sizes:
    """A histogram of sizes which the engine counts by powers of two."""

    def __init__(
        self, name: str, about: str, count: int, labels: Mapping[str, str] | None = None
    ) -> None:
        """count: the buckets besides the one up to infinity."""
        labels = labels or {}
        self._header = header(name, "histogram", about)
        self._lines = buckets(name, [1 << i for i in range(count)], labels)
        self._sum_line = labelled(f"{name}_sum", labels)
        self._count_line = labelled(f"{name}_count", labels)

    def write(self, sizes: SizeCounts) -> Iterator[str]:
        bounded = len(self._lines) - 1
        counts = [*sizes.counts[:bounded], *[0] * (bounded - len(sizes.counts))]
        counts.append(sum(sizes.counts[bounded:]))
        yield self._header
        yield from histogram_lines(
            self._lines, self._sum_line, self._count_line, counts, sizes.total
        )
