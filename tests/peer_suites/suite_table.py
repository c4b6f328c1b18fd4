"""A suite's tests that do not apply are skipped with the reason; the rest are counted by file."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


class Outcome:
    """A pytest plugin. ``settings`` is a TOML file; see :mod:`run`.

    Its table ``not_applicable`` is of ``reason = [regular expressions]``, which are searched
    in ``file.py::test[parameters]``; the first reason that fits counts.
    """

    def __init__(self, settings: Path) -> None:
        table = tomllib.loads(settings.read_text())["not_applicable"]
        self._reasons = {reason: re.compile("|".join(each)) for reason, each in table.items()}
        self._counts: dict[str, Counter[str]] = {}
        self._skipped: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            name = f"{item.path.name}::{item.name}"
            for reason, pattern in self._reasons.items():
                if pattern.search(name):
                    item.add_marker(pytest.mark.skip(reason=reason))
                    break

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            file = report.nodeid.partition("::")[0].rpartition("/")[2]
            self._counts.setdefault(file, Counter())[report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        write = terminalreporter.write_line
        write("")
        write("| file | passed | not applicable | ours to mend |")
        write("| --- | ---: | ---: | ---: |")
        total: Counter[str] = Counter()
        for file, counts in sorted(self._counts.items()):
            total += counts
            write(f"| {file} | {counts['passed']} | {counts['skipped']} | {counts['failed']} |")
        write(f"| all | {total['passed']} | {total['skipped']} | {total['failed']} |")
        write("")
        write("| not applicable, because | tests |")
        write("| --- | ---: |")
        for reason, number in self._skipped.most_common():
            write(f"| {reason} | {number} |")
