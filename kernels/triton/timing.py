"""Times GPU work by replaying it as a CUDA graph, so that launch overhead is not measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def milliseconds(calls: Sequence[Call], repeats: int = 7) -> float:
    """The time of one call: the median over ``repeats`` replays of all ``calls`` in order.

    Give calls on separate copies of their inputs, together larger than the L2 cache, or repeats
    will measure the cache. Without a GPU (the dry run) the calls are timed once by the clock.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e3 / len(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compile, and create library handles, outside the capture
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # A server's other threads may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    taken: list[float] = []
    for _ in range(repeats + 1):
        start_event = torch.cuda.Event(enable_timing=True)
        end_event = torch.cuda.Event(enable_timing=True)
        start_event.record()
        graph.replay()
        end_event.record()
        end_event.synchronize()
        taken.append(start_event.elapsed_time(end_event) / len(calls))
    return statistics.median(taken[1:])


def by_clock(call: Call, repeats: int) -> float:
    """The median time of one call in milliseconds, waiting for the device after each."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def bandwidth(device: torch.device, megabytes: int = 2048) -> float:
    """Bytes a second of a device-to-device copy, read and written bytes both counted."""
    source = torch.randint(0, 256, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds([lambda: target.copy_(source)]) / 1e3)


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Floating-point operations a second of a square bfloat16 product of random numbers."""
    a = torch.randn(size, size, device=device).bfloat16()
    b = torch.randn(size, size, device=device).bfloat16()
    return 2 * size**3 / (milliseconds([lambda: a @ b] * 3) / 1e3)
