"""The process that renders templates, forked from this one instead of started anew.

To start it imports transformers: two seconds of a slow processor for every server of the tests. The
process as it is started otherwise is tested in tests/loaders/test_templates.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from nybble.loaders.templates import renderer, worker


class _Forked:
    """What the renderer uses of subprocess.Popen."""

    def __init__(self) -> None:
        (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(write_in)
            os.close(read_out)
            sys.stdin, sys.stdout = os.fdopen(read_in), os.fdopen(write_out, "w")
            try:
                worker.main()
            finally:
                os._exit(1)
        os.close(read_in)
        os.close(write_out)
        self.stdin = os.fdopen(write_in, "w", encoding="utf-8")
        self.stdout = os.fdopen(read_out, encoding="utf-8")
        self._returncode: int | None = None

    def poll(self) -> int | None:
        return self._await(os.WNOHANG)

    def wait(self) -> int:
        code = self._await(0)
        assert code is not None
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def _await(self, options: int) -> int | None:
        if self._returncode is None:
            pid, status = os.waitpid(self._pid, options)
            if pid:
                self._returncode = os.waitstatus_to_exitcode(status)
        return self._returncode


def use() -> None:
    """Fork one now, while this process has one thread; should it end, the next ones are started."""
    ready = [_Forked()]

    def popen(*arguments: Any, **options: Any) -> Any:
        return ready.pop() if ready else subprocess.Popen(*arguments, **options)

    stands_in = SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE)
    renderer.subprocess = stands_in  # type: ignore[attr-defined]
