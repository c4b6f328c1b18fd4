"""Client libraries against a live server; `make test-clients` runs them in an environment of their
own, because their pins are not the server's."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Server:
    url: str  # with /v1
    folder: Path  # of the model


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny random model in a process of the server's own environment."""
    with running_server(tmp_path_factory.mktemp("clients") / "tiny") as server:
        yield server


@contextmanager
def running_server(folder: Path, program: str = "serve_tiny.py") -> Iterator[Server]:
    """A server of a model which the program writes into this folder."""
    command = [ROOT / ".venv/bin/python", Path(__file__).parent / program, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"http://\S+/v1", line):
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(lines))
        # Something must read on, or the server would block on a full pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Server(match[0], folder)
    finally:
        process.kill()
        process.wait()
