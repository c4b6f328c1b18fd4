"""Streams, events and graphs with the interface of ``torch.cuda``, on the emulated device.

Work is done in the order in which it was given, whatever the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .device import DEVICE, Graph


class Stream:
    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        DEVICE.wait("Stream.synchronize")


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._enable_timing = enable_timing
        self._at = 0

    def record(self, stream: Stream | None = None) -> None:
        self._at = DEVICE.submitted

    def synchronize(self) -> None:
        DEVICE.wait("Event.synchronize", self._at)

    def elapsed_time(self, later: Event) -> float:
        """A microsecond for each piece of work between the two, in milliseconds."""
        assert self._enable_timing
        assert later._enable_timing
        return (later._at - self._at) / 1e3


class CUDAGraph:
    def __init__(self) -> None:
        self.captured: Graph | None = None

    def replay(self) -> None:
        assert self.captured is not None
        DEVICE.replay(self.captured)


STREAM = Stream()


@contextmanager
def stream(used: Stream) -> Iterator[None]:
    yield


@contextmanager
def graph(
    captured: CUDAGraph,
    pool: object = None,
    stream: Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    if capture_error_mode != "thread_local":
        raise RuntimeError(
            f"captured in the mode {capture_error_mode!r}: what another thread of a server asks of "
            "the device would end the capture"
        )
    with DEVICE.capture(object() if pool is None else pool) as captured.captured:
        yield
