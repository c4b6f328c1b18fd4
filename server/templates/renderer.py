"""The server's side of the process that renders chat templates."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)

_WORKER = "nybble.server.templates.worker"


class TemplateRefusedError(Exception):
    """The template does not take these messages."""


class TemplateFailedError(Exception):
    """The template took too long, too much memory, or made too much text."""


class TemplateRenderer:
    """Renders one conversation at a time, from any thread; starts its process when it needs one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process, so that the first rendering finds it ready."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._reap(self._process)

    def render(
        self,
        template: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        variables: dict[str, Any],
    ) -> str:
        """The conversation as text, up to the assistant's turn.

        Raises TemplateRefusedError and TemplateFailedError.
        """
        request = json.dumps(
            {"template": template, "messages": messages, "tools": tools, "variables": variables}
        )
        with self._lock:
            answer = self._ask(request)
        if "refused" in answer:
            raise TemplateRefusedError(answer["refused"])
        if "failed" in answer:
            raise TemplateFailedError(answer["failed"])
        return answer["text"]

    def _ask(self, request: str) -> dict[str, str]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, str] = json.loads(line)
            return answer
        status = self._reap(process)
        if status == -signal.SIGPROF:
            return {"failed": "it takes too long"}
        logger.error("the process that renders chat templates ended with status %d", status)
        return {"failed": f"its process ended with status {status}"}

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
            )
        return self._process

    def _reap(self, process: subprocess.Popen[str]) -> int:
        self._process = None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # what was not written has nobody to read it
        return process.wait()
