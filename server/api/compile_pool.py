"""Threads that compile grammars, with a large stack for deep ones and a time limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError

T = TypeVar("T")

# The compiler recurses: thousands of rules, each naming the next, overflow a thread's usual 8 MiB,
# which would crash the process. Unused stack takes no memory.
_STACK_BYTES = 512 << 20


class CompilePool:
    """A few threads that compile; one grammar may take ``seconds``."""

    def __init__(self, workers: int = 2, seconds: float = 20) -> None:
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="nybble-compile")
        before = threading.stack_size(_STACK_BYTES)
        try:
            started = threading.Barrier(workers + 1)
            for _ in range(workers):  # start now, while new threads get the large stack
                self._pool.submit(started.wait)
            started.wait()
        finally:
            threading.stack_size(before)

    async def run(self, compile: Callable[[], T], param: str) -> T:
        """Run ``compile`` on a thread and return its result.

        Raises what ``compile`` raises, ApiError 400 if it takes too long, and 503 if other
        compilations occupy every thread. One that takes too long cannot be stopped: its thread
        stays busy until it is done.
        """
        begun = threading.Event()

        def work() -> T:
            begun.set()
            return compile()

        future = self._pool.submit(work)
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            future.cancel()
            if begun.is_set():
                raise ApiError(
                    400,
                    f"{param} takes more than {self._seconds:g} s to compile: make it simpler",
                    param=param,
                    code="invalid_value",
                ) from None
            raise ApiError(
                503,
                "other requests' grammars are being compiled",
                code="overloaded",
                retry_after=retry_after.BUSY,
            ) from None
