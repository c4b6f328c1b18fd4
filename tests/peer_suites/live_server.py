"""Live servers of a tiny model for the suites of other servers; one for each set of options."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TESTS = ROOT / "tests"
# A server takes seconds to start: those with the options asked for last are kept.
_KEPT = 3


@dataclass(frozen=True)
class Models:
    """A tiny random model that knows tools, and an adapter for it."""

    model: Path
    adapter: Path


@cache
def models() -> Models:
    """Written once; by this process, which has the server's packages on its path."""
    sys.path[:0] = [str(_TESTS), str(_TESTS / "clients")]
    import serve_tiny  # type: ignore[import-not-found]
    import tiny  # type: ignore[import-not-found]

    folder = Path(tempfile.mkdtemp(prefix="peer-suites-"))
    serve_tiny.write_model(folder / "model", max_length=16384)
    tiny.write_tiny_adapter(folder / "adapter", folder / "model")
    return Models(folder / "model", folder / "adapter")


class Pool:
    """Starts servers with ``nybble serve`` of the server's own environment."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, ...], tuple[str, subprocess.Popen[str]]] = {}

    def url(self, *options: str) -> str:
        """The origin of a server with these options."""
        found = self._servers.pop(options, None)
        if found is None or found[1].poll() is not None:
            found = self._start(options)
        self._servers[options] = found
        while len(self._servers) > _KEPT:
            self._end(next(iter(self._servers)))
        return found[0]

    def close(self) -> None:
        for options in list(self._servers):
            self._end(options)

    def _start(self, options: tuple[str, ...]) -> tuple[str, subprocess.Popen[str]]:
        command = [ROOT / ".venv/bin/nybble", "serve", models().model, "--port", "0"]
        process = subprocess.Popen(
            [*command, "--kv-cache-memory", "64MiB", *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"URL +(http://\S+)/v1", line):
                # Something must read on, or the server would block on a full pipe.
                threading.Thread(target=process.stderr.read, daemon=True).start()
                return match[1], process
        raise AssertionError(f"nybble serve {' '.join(options)}:\n{''.join(lines)}")

    def _end(self, options: tuple[str, ...]) -> None:
        _, process = self._servers.pop(options)
        process.kill()
        process.wait()
