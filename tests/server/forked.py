"""Server processes that start in a second: forked from one that has imported everything.

To import PyTorch and transformers takes 4 of the 5 seconds in which such a server starts.
The start itself, imports included, is tested in tests/faults and tests/server/cli.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

BECOME_SERVER = Path(__file__).with_name("become_server.py")
BECOME_HUNG_SERVER = Path(__file__).with_name("become_hung_server.py")
BECOME_KILLED_SERVER = Path(__file__).with_name("become_killed_server.py")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "nybble.server.cli.main",
        "nybble.server.lifecycle.launch",
        "transformers.utils.chat_template_utils",
    ]
)


class ForkedServer:
    """The ``nybble`` command as a process of its own, with what tests use of subprocess.Popen.

    script: what the process runs; see become_server.py.
    stderr: text lines of its standard error.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        script: Path = BECOME_SERVER,
    ) -> None:
        reader, writer = _CONTEXT.Pipe(duplex=False)
        given = {"given": (arguments, environment, writer)}
        self._process = _CONTEXT.Process(
            target=runpy.run_path, args=(str(script), given, "__main__"), daemon=False
        )
        self._process.start()
        writer.close()
        self.stderr = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
        reader.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired after ``timeout`` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("nybble", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it may have ended, and not been waited for yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
