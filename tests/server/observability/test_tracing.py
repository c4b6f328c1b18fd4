"""OpenTelemetry: what a request's spans are, whose trace they continue, and that off is off."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.request import Request, urlopen

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from nybble.engine import Engine
from nybble.server.observability.tracing import Tracing

from ..client import CHAT, COMPLETIONS, HELLO, Client, run
from ..conftest import running_server

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "swordfish"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> Tracing:
    return Tracing(SimpleSpanProcessor(spans), "nybble")


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def test_a_request_has_its_queue_prefill_and_decode_within_the_callers_trace(
    engine: Engine, tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    async def scenario(client: Client) -> None:
        for stream in (False, True):
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 5, "n": 2}
            headers = {"X-Request-Id": "abc-1", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            body |= {"ignore_eos": True, "stream": stream}
            async with client.post(CHAT, json=body, headers=headers) as response:
                await response.read()

    run(engine, scenario, tracing=tracing)
    requests = named(spans, f"POST {CHAT}")
    assert len(requests) == 2
    for request in requests:
        assert format(request.context.trace_id, "032x") == TRACE
        assert request.parent is not None
        assert format(request.parent.span_id, "016x") == PARENT
        assert request.attributes is not None
        assert request.attributes["nybble.request_id"] == "abc-1"
        assert request.attributes["http.response.status_code"] == 200
        sequences = [
            span
            for span in named(spans, "sequence")
            if span.parent is not None and span.parent.span_id == request.context.span_id
        ]
        assert len(sequences) == 2
        for sequence in sequences:
            assert sequence.attributes is not None
            assert sequence.attributes["gen_ai.usage.output_tokens"] == 5
            assert sequence.attributes["gen_ai.response.finish_reasons"] == ("length",)
            queue, prefill, decode = (
                span
                for name in ("queue", "prefill", "decode")
                for span in named(spans, name)
                if span.parent is not None and span.parent.span_id == sequence.context.span_id
            )
            times = [sequence.start_time, queue.start_time, queue.end_time, prefill.start_time]
            times += [prefill.end_time, decode.start_time, decode.end_time, sequence.end_time]
            assert times == sorted(times)
            assert request.start_time <= sequence.start_time
            assert abs(sequence.end_time - request.end_time) < 10**9


def test_errors_are_marked_and_nothing_said_is_in_a_span(
    engine: Engine, tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": SECRET, "max_tokens": 2}
        headers = {"Authorization": f"Bearer {SECRET}"}
        await (await client.post(f"{COMPLETIONS}?q={SECRET}", json=body, headers=headers)).read()
        await (await client.post(COMPLETIONS, json={**body, "stop": [SECRET] * 99})).read()
        engine.stop()
        await (await client.post(COMPLETIONS, json=body)).read()
        await (await client.get("/health")).read()

    run(engine, scenario, tracing=tracing)
    fine, refused, failed = named(spans, f"POST {COMPLETIONS}")
    assert fine.status.status_code == StatusCode.UNSET
    assert refused.attributes is not None
    assert refused.attributes["http.response.status_code"] == 400
    assert refused.status.status_code == StatusCode.UNSET  # the caller's mistake
    assert failed.attributes is not None
    assert failed.attributes["error.type"] == "engine_unavailable"
    assert failed.status.status_code == StatusCode.ERROR
    assert SECRET not in "".join(span.to_json() for span in spans.get_finished_spans())
    assert not named(spans, "GET /health")


class Collector(BaseHTTPRequestHandler):
    """What OTLP over HTTP asks of a collector; keeps the spans it is sent."""

    spans: ClassVar[list[Span]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        assert self.headers["Content-Type"] == "application/x-protobuf"
        sent = ExportTraceServiceRequest.FromString(body)
        for resource in sent.resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            assert names["service.name"] == "nybble"
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_collector_gets_the_spans_of_a_server_by_the_time_it_has_ended(
    tiny_model: Callable[..., Path],
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with running_server(tiny_model(), "--otlp-endpoint", endpoint) as server:
            body = json.dumps({"model": "tiny", "prompt": SECRET, "max_tokens": 3})
            headers = {
                "Content-Type": "application/json",
                "traceparent": f"00-{TRACE}-{PARENT}-01",
            }
            request = Request(server.url + COMPLETIONS, body.encode(), headers)
            with urlopen(request) as response:
                assert response.status == 200
            server.terminate()
            assert server.process.wait(60) == 0
        collector.shutdown()
    named = {span.name: span for span in Collector.spans}
    assert set(named) == {f"POST {COMPLETIONS}", "sequence", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in Collector.spans} == {TRACE}
    assert named[f"POST {COMPLETIONS}"].parent_span_id.hex() == PARENT
    assert named["decode"].parent_span_id == named["sequence"].span_id
    for span in Collector.spans:
        assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano
        assert SECRET not in str(span)
