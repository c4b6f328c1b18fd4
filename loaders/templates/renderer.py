"""The parent's side of the processes that render chat templates."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Run as a file, not as a module: importing the packages around it would dominate its start.
_WORKER = Path(__file__).with_name("worker.py")
_LONG = 1 << 16  # characters: rendered in about a hundredth of a second


class TemplateRefusedError(Exception):
    """The template does not take these messages."""


class TemplateInvalidError(TemplateRefusedError):
    """The template is not valid Jinja, so it takes no messages at all."""


class TemplateFailedError(Exception):
    """The template took too long, too much memory, or made too much text."""


class TemplateRenderer:
    """Renders from any thread. Long conversations have a process of their own, so that short
    ones never wait for them.
    """

    def __init__(self) -> None:
        self._short, self._long = _Lane("short"), _Lane("long")

    def start(self) -> None:
        """Start the process for short conversations, so that it is ready for the first one."""
        self._short.start()

    def close(self) -> None:
        """End the processes at once; what they have not rendered raises TemplateFailedError."""
        self._short.close()
        self._long.close()

    def render(
        self,
        template: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: dict[str, Any],
    ) -> str:
        """The conversation as text, up to the assistant's turn; waits for :meth:`submit`."""
        return self.submit(template, messages, tools, variables).result()

    def submit(
        self,
        template: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: dict[str, Any],
    ) -> Future[str]:
        """The conversation as text, up to the assistant's turn.

        The future raises TemplateRefusedError and TemplateFailedError.
        """
        length = sum(map(_length, messages))
        lane = self._long if length > _LONG else self._short
        request = {"template": template, "messages": messages, "tools": tools}
        return lane.submit(request | {"variables": variables})


def _length(message: dict[str, Any]) -> int:
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


class _Lane:
    """A process, started when it is needed, that renders one conversation after another."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"nybble-template-{name}")
        self._process: subprocess.Popen[str] | None = None
        self._closing = False

    def start(self) -> None:
        self._pool.submit(self._running).result()

    def close(self) -> None:
        """End the process: what it has not rendered fails. The lane may be used again."""
        self._closing = True
        if (process := self._process) is not None:
            process.kill()  # it may be in the middle of a rendering
        try:
            ended = self._pool.submit(self._end)
        except RuntimeError:  # Python is ending, and has ended the pool's thread
            self._end()
        else:
            ended.result()

    def submit(self, request: dict[str, Any]) -> Future[str]:
        return self._pool.submit(self._render, request)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._reap(self._process)
        self._closing = False

    def _render(self, request: dict[str, Any]) -> str:
        answer = self._ask(json.dumps(request))
        if "invalid" in answer:
            raise TemplateInvalidError(answer["invalid"])
        if "refused" in answer:
            raise TemplateRefusedError(answer["refused"])
        if "failed" in answer:
            raise TemplateFailedError(answer["failed"])
        return answer["text"]

    def _ask(self, request: str) -> dict[str, str]:
        stopped = {"failed": "it was stopped"}
        process = self._running()
        if self._closing:
            return stopped
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
        if self._closing:
            return stopped
        if status == -signal.SIGPROF:
            return {"failed": "it takes too long"}
        logger.error("the process that renders chat templates ended with status %d", status)
        return {"failed": f"its process ended with status {status}"}

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
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
                continue  # unflushed input: the process is gone and cannot read it
        return process.wait()
