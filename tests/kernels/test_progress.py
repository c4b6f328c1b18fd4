"""Progress is a bar on a terminal, a line now and then in a file, and calls for a callback."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from nybble.kernels import progress
from nybble.kernels.progress import Bar, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(track(range(3), "Packing", True, unit="tensors")) == [0, 1, 2]
    assert "\rPacking: 100%|" in stderr.getvalue()
    assert "3/3 [" in stderr.getvalue()


def test_a_file_has_whole_lines_the_first_and_the_last_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    for index in track(range(1000), "Packing", True, unit="tensors"):
        if index == 500:
            Bar.write("a line of its own", file=stderr)
    begin, middle, end = stderr.getvalue().splitlines()
    assert begin.startswith("Packing: 0/1000 tensors")
    assert middle == "a line of its own"
    assert end.startswith("Packing: 1000/1000 tensors")
    assert not {"\r", "\x1b"} & set(stderr.getvalue())


def test_a_file_has_a_line_each_time_that_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0)
    stderr = io.StringIO()
    with Bar(total=4, desc="Training", unit=" steps", file=stderr, miniters=1) as bar:
        for loss in range(4):
            bar.set_postfix(loss=loss, refresh=False)
            bar.update()
    lines = [line.rpartition(" (")[0] for line in stderr.getvalue().splitlines()]
    assert lines[0] == "Training: 0/4 steps"
    assert lines[1:5] == [f"Training: {n}/4 steps, loss={n - 1}" for n in (1, 2, 3, 4)]


def test_without_a_total_a_file_has_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    list(track((index for index in range(5)), "Loading weights", True, unit="tensors"))
    begin, end = (line.rpartition(" (")[0] for line in stderr.getvalue().splitlines())
    assert (begin, end) == ("Loading weights: 0 tensors", "Loading weights: 5 tensors")


def test_nothing_is_shown_where_nothing_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "Packing", False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_callback_is_told_of_the_beginning_and_each_piece() -> None:
    told: list[tuple[str, int, int | None]] = []
    assert list(track("ab", "Packing", lambda *report: told.append(report))) == ["a", "b"]
    assert told == [("Packing", 0, 2), ("Packing", 1, 2), ("Packing", 2, 2)]


def test_nothing_else_makes_bars() -> None:
    """tqdm's own would write carriage returns into log files."""
    root = Path(progress.__file__).resolve().parents[1]
    found = subprocess.run(
        ["git", "grep", "-lE", r"^\s*(from|import) tqdm", "--", "*.py"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    # The server's start shows one on a terminal, and the lines of a log elsewhere.
    assert set(found) - {"kernels/progress.py", "server/lifecycle/startup.py"} == set()
