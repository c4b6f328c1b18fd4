"""Where a request's outputs go: from the engine thread to the event loop that waits for them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass

from nybble.engine.request import RequestOutput


@dataclass(frozen=True)
class Stream:
    """A request's outputs in order. An exception is always the last item."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[RequestOutput | Exception]

    def send(self, item: RequestOutput | Exception) -> None:
        """Put an item in from any thread."""
        _call(self.loop, self.queue.put_nowait, item)


# What a step sends, in order.
Outputs = list[tuple[Stream, RequestOutput | Exception]]


def deliver(outputs: Outputs) -> None:
    """Send outputs to many streams: each event loop is called once."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, Outputs] = defaultdict(list)
    for stream, item in outputs:
        by_loop[stream.loop].append((stream, item))
    for loop, items in by_loop.items():
        _call(loop, _put, items)


def _put(items: Outputs) -> None:
    for stream, item in items:
        stream.queue.put_nowait(item)


def _call(loop: asyncio.AbstractEventLoop, function: object, argument: object) -> None:
    """Call a function on another thread's event loop; does nothing if the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, argument)  # type: ignore[arg-type]
    except RuntimeError:
        if not loop.is_closed():
            raise
