"""Real server processes, some with a fault in them, and what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from nybble.loaders.cache import cache_folder

from ..server.forked import ForkedServer

SERVER = [sys.executable, "-P", "-c", "from nybble.server.cli.main import main; main()"]
FAULTY = Path(__file__).with_name("faulty_server.py")
PATIENCE = 180.0  # seconds for what takes a few on a quiet machine


@dataclass
class Process:
    """A server. lines: what it has written to stderr."""

    process: subprocess.Popen[str] | ForkedServer
    lines: list[str] = field(default_factory=list)

    def read(self, stream: IO[str]) -> None:
        with suppress(ValueError):
            self.lines.extend(iter(stream.readline, ""))

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def find(self, pattern: str) -> str:
        """The first match in the log, once it is there."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if match := re.search(pattern, self.log):
                return match[0]
            if self.process.poll() is not None:
                time.sleep(0.2)
                if match := re.search(pattern, self.log):
                    return match[0]
                break
            time.sleep(0.01)
        raise AssertionError(f"{pattern!r} is not in the log:\n{self.log}")

    @property
    def origin(self) -> str:
        """Where it answers, from the first moment on."""
        return self.find(r"http://[^\s\"/]+")

    def ready(self) -> str:
        self.find(r"http://[^\s\"]+/v1")
        return self.origin

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """``launch(model, *options, command=SERVER, **Popen's)``; its cache and TMPDIR, ``t``, are the
    test's own.

    With ``script=`` it is a ``ForkedServer``, which spares the imports.
    """
    running: list[Process] = []
    compiled = cache_folder() / "kernels"
    compiled.mkdir(parents=True, exist_ok=True)
    (tmp_path / "c/nybble").mkdir(parents=True)
    (tmp_path / "t").mkdir()
    (tmp_path / "c/nybble/kernels").symlink_to(compiled)

    def start(
        model: Path,
        *options: str,
        command: list[str] = SERVER,
        script: Path | None = None,
        environment: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Process:
        arguments = ("serve", "--model", str(model), "--served-model-name", "tiny", "--port", "0")
        small = ("--kv-cache-memory", "16MiB", "--log-format", "json")
        own = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "c")}
        own["TMPDIR"] = str(tmp_path / "t")
        env = {**os.environ, **own, **(environment or {})}
        env.pop("PYTHONUNBUFFERED", None)  # with it no log is lost at the end
        # Where files may not grow, Python would leave compiled modules cut off.
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        process: subprocess.Popen[str] | ForkedServer
        if script is not None:
            process = ForkedServer([*arguments, *small, *options], env, script)
        else:
            process = subprocess.Popen(
                [*command, *arguments, *small, *options],
                **{"stderr": subprocess.PIPE, "text": True, "env": env, **more},
            )
        found = Process(process)
        if process.stderr is not None:
            threading.Thread(target=found.read, args=(process.stderr,), daemon=True).start()
        running.append(found)
        return found

    yield start
    for each in running:
        each.process.kill()
        each.process.wait()


@contextmanager
def opened(url: str, body: Any = None, key: str | None = None) -> Iterator[Any]:
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            yield response
    except urllib.error.HTTPError as error:
        yield error


def ask(url: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer, whatever its status."""
    with opened(url, body, key) as response:
        return response.status, json.loads(response.read())
