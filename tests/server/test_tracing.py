"""OpenTelemetry: what a request's spans are, whose trace they continue, and that off is off."""

from __future__ import annotations

import subprocess
import sys

import pytest
from nybble.engine import Engine
from nybble.server.tracing import Tracing
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from .client import CHAT, COMPLETIONS, HELLO, Client, run

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


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import sys, nybble.server.serve, nybble.server.cli.main, nybble.server.cli.launch\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
