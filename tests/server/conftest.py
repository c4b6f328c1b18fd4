"""A server process for clients from outside, and the application in this process for the rest."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from openai import OpenAI

from nybble.engine import Engine, EngineConfig
from nybble.loaders import open_checkpoint

from .forked import BECOME_SERVER, ForkedServer

COMMAND = [sys.executable, "-P", "-c", "from nybble.server.cli.main import main; main()"]
MODEL = "tiny"
CONFIG = EngineConfig(
    dtype=torch.float32,
    kv_cache_bytes=4 << 20,
    max_num_seqs=8,
    max_batched_tokens=64,
    max_waiting=8,
)


@dataclass
class ServerProcess:
    process: ForkedServer
    url: str
    lines: list[str]
    reader: threading.Thread

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def log(self) -> str:
        """All it wrote, once it has ended."""
        self.process.wait(60)
        self.reader.join()
        return "".join(self.lines)


@contextmanager
def running_server(
    folder: Path,
    *options: str,
    script: Path = BECOME_SERVER,
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """``nybble serve`` on a free port, as its own process.

    script: what becomes the server; see become_server.py. environment: besides this process's.
    """
    process = ForkedServer(
        [
            *("serve", "--model", str(folder), "--served-model-name", MODEL),
            *("--port", "0", "--kv-cache-memory", "16MiB", *options),
        ],
        {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        script,
    )
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"https?(\+unix)?://\S+(?=/v1)", line):
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(lines))
        # Something must read on, or the server would block on a full pipe.
        reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        reader.start()
        yield ServerProcess(process, match[0], lines, reader)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server(tiny_model: Callable[..., Path]) -> Iterator[ServerProcess]:
    with running_server(tiny_model(), "--max-waiting", "1000") as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@contextmanager
def started_engine(folder: Path) -> Iterator[Engine]:
    engine = Engine.load(open_checkpoint(folder), CONFIG, progress=False)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An engine of this process, started."""
    with started_engine(tiny_model()) as engine:
        yield engine
