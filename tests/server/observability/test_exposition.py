"""What our counters and histograms write is what prometheus_client would have written."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from nybble.server.observability.exposition import counter, header, histogram, labelled, number

BOUNDS = (0.001, 0.25, 1, 5, 300, 131072)
NASTY = 'a "quoted" back\\slash,\nnew line {é}'


def parsed(text: str) -> list[object]:
    """Families by what Prometheus reads, without the times of creation that only one writes."""
    return [
        (family.name, family.type, family.documentation, family.samples)
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    ]


def test_histograms_and_counters_are_read_as_the_librarys_are() -> None:
    registry = CollectorRegistry()
    theirs = Histogram("h", "Times.\nIn \\ s.", ["route"], buckets=BOUNDS, registry=registry)
    their_count = Counter("c", "Words.", ["a", "b"], registry=registry)
    ours = histogram("h", "Times.\nIn \\ s.", BOUNDS, ["route"])
    our_count = counter("c", "Words.", ["a", "b"])
    for route in ("/x", NASTY):
        # On a bound, between two, below the first and above the last.
        for value in (0.25, 0.2500001, 0, 4, 1e9, 300, 131072.0):
            theirs.labels(route).observe(value)
            ours.labels(route).observe(value)
    for labels, amount in (((NASTY, ""), 1), (("x", "y"), 2.5), (("x", "y"), 10**15)):
        their_count.labels(*labels).inc(amount)
        our_count.labels(*labels).inc(amount)
    our_count.labels("to be", "removed").inc()
    our_count.remove("to be", "removed")
    our_count.remove("never", "there")
    text = "".join([*ours.write(), *our_count.write()])
    assert parsed(text) == parsed(generate_latest(registry).decode())


def test_every_float_is_a_number_for_prometheus() -> None:
    values = (0.0, -1.5, 1e-9, 1e300, 3, True, math.inf, -math.inf)
    text = header("g", "gauge", "Values.") + "".join(
        f"{labelled('g', {'i': str(i)})} {number(value)}\n" for i, value in enumerate(values)
    )
    (family,) = text_string_to_metric_families(text)
    assert [sample.value for sample in family.samples] == [float(value) for value in values]
    assert number(math.nan) == "NaN"
