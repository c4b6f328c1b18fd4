"""OpenTelemetry traces: a span for each request, with queue, prefill and decode below it.

Imported only if ``--otlp-endpoint`` is given. Source of names: OpenTelemetry's semantic
conventions for HTTP and generative AI.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version

from aiohttp import web
from aiohttp.typedefs import Middleware
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nybble.server.api.generation import SequenceTimes
from nybble.server.http.paths import matched_path
from nybble.server.observability.request_record import RECORD

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PATHS = ("/v1/", "/tokenize", "/detokenize")


class Tracing:
    """Traces of one server; a caller's W3C ``traceparent`` is continued."""

    def __init__(self, processor: SpanProcessor, service: str) -> None:
        attributes = {"service.name": service, "service.version": version("nybble")}
        self._provider = TracerProvider(resource=Resource.create(attributes))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("nybble")
        self._propagator = TraceContextTextMapPropagator()
        # Spans need the time of day; sequences are timed by the monotonic clock.
        self._offset = time.time_ns() - time.monotonic_ns()

    @classmethod
    def to(cls, endpoint: str, service: str = "nybble") -> Tracing:
        """endpoint: an OTLP/HTTP URL such as ``http://localhost:4318/v1/traces``."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint)), service)

    def middleware(self) -> Middleware:
        """A span for each request of the API, current while it is handled."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not matched_path(request).startswith(_PATHS):
                return await handler(request)
            resource = request.match_info.route.resource
            route = resource.canonical if resource is not None else "unknown"
            record = request[RECORD]
            with self._tracer.start_as_current_span(
                f"{request.method} {route}",
                context=self._propagator.extract(request.headers),
                kind=SpanKind.SERVER,
                attributes={
                    "http.request.method": request.method,
                    "http.route": route,
                    "nybble.request_id": record.id,
                },
                record_exception=False,  # its text may quote the prompt
            ) as span:
                record.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
                response = await handler(request)
                span.set_attribute("http.response.status_code", response.status)
                if record.cause is not None:
                    span.set_attribute("error.type", record.cause)
                if response.status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
                return response

        return middleware

    def sequence(self, times: SequenceTimes) -> None:
        """Spans of a sequence that has ended, below the request's."""
        span = self._span(
            "sequence",
            times.arrived,
            {
                "nybble.sequence_id": times.id,
                "gen_ai.usage.input_tokens": times.prompt_tokens,
                "gen_ai.usage.output_tokens": times.tokens,
                "gen_ai.response.finish_reasons": (times.reason,),
                **({} if times.adapter is None else {"nybble.adapter": times.adapter}),
            },
        )
        with trace.use_span(span):
            if times.tokens:
                for name, start, end in (
                    ("queue", times.arrived, times.started),
                    ("prefill", times.started, times.first),
                    ("decode", times.first, times.last),
                ):
                    self._span(name, start).end(self._nanoseconds(end))
        if times.reason == "error":
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._nanoseconds(times.ended))

    def close(self) -> None:
        """Send the remaining spans; gives up on a collector that does not answer."""
        self._provider.shutdown()

    def _span(
        self, name: str, start: float, attributes: dict[str, str | int | tuple[str]] | None = None
    ) -> Span:
        return self._tracer.start_span(
            name, attributes=attributes, start_time=self._nanoseconds(start)
        )

    def _nanoseconds(self, monotonic: float) -> int:
        return int(monotonic * 1e9) + self._offset
