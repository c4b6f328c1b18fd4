"""Counters and histograms that are quick to write in Prometheus' text format.

prometheus_client makes an object of every sample and checks its names at every scrape: 4.7 ms for
the 800 lines of a busy server, in which its event loop does nothing else, and a router may scrape
every 50 ms. Here the parts of a line that never change are text from the start. Format:
https://prometheus.io/docs/instrumenting/exposition_formats/. Nothing here may be used from several
threads.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, Literal, Protocol, TypeVar

Kind = Literal["counter", "gauge", "histogram"]


def header(name: str, kind: Kind, about: str) -> str:
    """The two lines in front of a family's samples."""
    text = about.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def labelled(name: str, labels: Mapping[str, str]) -> str:
    """A sample's line up to its value, which follows after a space."""
    if not labels:
        return name
    inside = ",".join(f'{label}="{_escaped(value)}"' for label, value in labels.items())
    return f"{name}{{{inside}}}"


def number(value: float) -> str:
    """A value as Prometheus reads it."""
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def buckets(name: str, bounds: Sequence[float], labels: Mapping[str, str]) -> tuple[str, ...]:
    """A histogram's lines up to their values: a bucket up to each bound, and the last up to ∞."""
    return tuple(
        labelled(f"{name}_bucket", {**labels, "le": number(bound)}) for bound in (*bounds, math.inf)
    )


def histogram_lines(
    lines: Sequence[str], sum_line: str, count_line: str, counts: Sequence[int], total: float
) -> Iterator[str]:
    """counts: of each bucket by itself, not of those below it as well. total: of the values."""
    below = 0
    for line, below in zip(lines, itertools.accumulate(counts), strict=True):
        yield f"{line} {below}.0\n"
    yield f"{count_line} {below}.0\n"
    yield f"{sum_line} {number(total)}\n"


class CounterSeries:
    """A counter with one set of labels."""

    def __init__(self, name: str, labels: Mapping[str, str]) -> None:
        self._line = labelled(f"{name}_total", labels)
        self._value = 0.0

    def inc(self, amount: float = 1) -> None:
        self._value += amount

    def write(self) -> Iterator[str]:
        yield f"{self._line} {number(self._value)}\n"


class HistogramSeries:
    """A histogram with one set of labels."""

    def __init__(self, name: str, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._lines = buckets(name, bounds, labels)
        self._sum_line = labelled(f"{name}_sum", labels)
        self._count_line = labelled(f"{name}_count", labels)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def write(self) -> Iterator[str]:
        return histogram_lines(
            self._lines, self._sum_line, self._count_line, self._counts, self._sum
        )


class _Series(Protocol):
    def write(self) -> Iterator[str]: ...


S = TypeVar("S", bound=_Series)


class Family(Generic[S]):
    """The series of one name, by the values of their labels."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        about: str,
        labels: Sequence[str],
        make: Callable[[str, Mapping[str, str]], S],
    ) -> None:
        """make: a series of the name and its labels."""
        self._name, self._labels, self._make = name, labels, make
        self._header = header(f"{name}_total" if kind == "counter" else name, kind, about)
        self._series: dict[tuple[str, ...], S] = {}

    def labels(self, *values: str) -> S:
        """The series with these values, which exists from now on."""
        series = self._series.get(values)
        if series is None:
            labels = dict(zip(self._labels, values, strict=True))
            series = self._series[values] = self._make(self._name, labels)
        return series

    def remove(self, *first: str) -> None:
        """End the series whose first labels have these values, if there are any."""
        for values in [each for each in self._series if each[: len(first)] == first]:
            del self._series[values]

    def write(self) -> Iterator[str]:
        yield self._header
        for series in self._series.values():
            yield from series.write()


def counter(name: str, about: str, labels: Sequence[str]) -> Family[CounterSeries]:
    """Counters called ``name_total``."""
    return Family(name, "counter", about, labels, CounterSeries)


def histogram(
    name: str, about: str, bounds: Sequence[float], labels: Sequence[str] = ()
) -> Family[HistogramSeries]:
    """Histograms with a bucket up to each bound, and one up to ∞."""
    return Family(
        name, "histogram", about, labels, lambda name, labels: HistogramSeries(name, labels, bounds)
    )


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
