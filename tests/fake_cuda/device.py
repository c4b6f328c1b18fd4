"""A GPU's memory, its queue of work and its captured graphs, as the host sees them.

What lies on the device is held by tensors of the host, and work is computed at once. What would be
asynchronous is still kept to:

- a copy *from* pinned memory has read it only once the host has waited for the copy. Until then
  the source must stay as it was;
- a copy *to* pinned memory has written it only then. Until then there is rubbish in it;
- fresh memory has rubbish in it;
- whatever makes the host wait for work that the device has not done is written down in ``waits``.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary, finalize, ref

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .memory import Allocation, Transfer, bytes_of, bytes_of_storage, place, readable, spoil

# The second of two, so that work left to the current device without saying so is on the first.
CUDA = torch.device("cuda", 1)


@dataclass
class Graph:
    """Operations captured on one thread, and the private memory they compute in."""

    pool: object
    calls: list[tuple[Callable[[], Any], list[Tensor]]] = field(default_factory=list)
    reads: set[ref[Allocation]] = field(default_factory=set)
    private: list[Tensor] = field(default_factory=list)


class Device:
    """What there is of the device: memory, work in flight, graphs.

    waits: for what the host has waited, and from where. launched: how often each (kernel, variant);
    see ``launches.py``. computes: whether kernels and graphs compute; warming up needs no results.
    has_numbers: whether there are numbers in memory at all; without, everything read is zero, and
    models of any size fit in the host. total: bytes of memory.
    """

    def __init__(self) -> None:
        self.allocated = 0
        self._memory: WeakValueDictionary[int, Allocation] = WeakValueDictionary()
        self._thread = threading.local()
        self._lock = threading.RLock()
        self.start_anew()

    def start_anew(self) -> None:
        """Forget everything but the tensors there are."""
        self.total = 64 << 20
        self.has_numbers = self.computes = True
        self.peak = self.allocated
        self.waits: list[str] = []
        self.launched = Counter[tuple[str, str]]()
        self.replays = 0
        self._pinned: dict[int, Tensor] = {}
        self._in_flight: list[Transfer] = []
        self._submitted = self._finished = 0
        self._graphs: list[Graph] = []

    @property
    def host_device(self) -> torch.device:
        """Where the numbers of the device's tensors really are."""
        return torch.device("cpu" if self.has_numbers else "meta")

    def memory_of(self, host: Tensor) -> Allocation:
        """The memory a tensor lies in; new memory where nothing does yet."""
        storage = host.untyped_storage()
        with self._lock:
            known = self._memory.get(place(host)) if storage.nbytes() else None
            if known is not None:
                return known
            made = Allocation(storage.nbytes(), self.capturing)
            if self.allocated + made.nbytes > self.total:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {made.nbytes} bytes"
                )
            self.allocated += made.nbytes
            self.peak = max(self.peak, self.allocated)
            self._memory[place(host)] = made
            finalize(made, self._free, made.nbytes)
            if made.graph is not None and self.has_numbers:
                made.graph.private.append(bytes_of_storage(host))
            return made

    def _free(self, nbytes: int) -> None:
        self.allocated -= nbytes

    def pin(self, host: Tensor) -> Tensor:
        """Pinned memory is never given back here, so that no two tensors have the same."""
        self._pinned[host.untyped_storage().data_ptr()] = host
        return host

    def is_pinned(self, host: Tensor) -> bool:
        return host.untyped_storage().data_ptr() in self._pinned

    @property
    def capturing(self) -> Graph | None:
        return getattr(self._thread, "graph", None)

    @property
    def submitted(self) -> int:
        """How much work has been given to the device so far."""
        return self._submitted

    def wait(self, reason: str, upto: int | None = None) -> None:
        """The host waits until the device has done the first ``upto`` pieces of work, or all."""
        with self._lock:
            upto = self._submitted if upto is None else upto
            if self.capturing is not None:
                raise RuntimeError(f"{reason}: not permitted while a stream is capturing")
            if upto > self._finished:
                self.waits.append(f"{reason} in {_caller()}")
                self._finished = upto
            done = [each for each in self._in_flight if each.number <= upto]
            self._in_flight = [each for each in self._in_flight if each.number > upto]
            for each in done:
                each.finish()

    def launch(
        self, kernel: str, variant: str, work: Callable[[], Any], reads: Iterable[Allocation]
    ) -> None:
        """Run a kernel; while a graph is being captured it is only written down."""
        found = (kernel, variant)
        if self.capturing is not None and found not in self.launched:
            raise RuntimeError(f"{kernel} would be compiled while a stream is capturing")
        self.launched[found] += 1
        compute = self.computes and self.has_numbers and self.capturing is None
        self.submit(work, reads, compute=compute)

    def submit(
        self, work: Callable[[], Any], reads: Iterable[Allocation], *, compute: bool = True
    ) -> Any:
        """Compute now, and again whenever the graph that is being captured is replayed.

        Returns what ``work`` returns.
        """
        with self._lock:
            self._submitted += 1
            result = work() if compute else None
            graph = self.capturing
            if graph is not None:
                graph.reads.update(ref(each) for each in reads if each.graph is not graph)
                graph.calls.append((work, _tensors(result)))
            return result

    def transfer(self, target: Tensor, source: Tensor, *, to_device: bool, blocks: bool) -> None:
        """Copy between memory of the host and what holds the device's; ``blocks``: and wait."""
        with self._lock:
            if self.capturing is not None:
                raise RuntimeError("a captured graph copies between the host and the device")
            self._submitted += 1
            if to_device:
                target.copy_(source)
                transfer = Transfer(self._submitted, source, source.clone(), True)
            else:
                numbers = readable(source).to(target.dtype, copy=True)
                transfer = Transfer(self._submitted, target, numbers, False)
                spoil(bytes_of(target))
            self._in_flight.append(transfer)
            if blocks or not self.is_pinned(source if to_device else target):
                self.wait("a copy between the device and memory that is not pinned, or not async")

    @contextmanager
    def capture(self, pool: object) -> Iterator[Graph]:
        """What this thread gives to the device inside belongs to the graph."""
        self.wait("capture")
        graph = Graph(pool)
        self._thread.graph = graph
        try:
            yield graph
        finally:
            self._thread.graph = None
        self._graphs.append(graph)

    def replay(self, graph: Graph) -> None:
        """Compute a graph again. Graphs of one pool compute in the same memory."""
        with self._lock:
            if any(memory() is None for memory in graph.reads):
                raise RuntimeError("a replayed graph reads memory that has been freed")
            for each in self._graphs:
                if each.pool is graph.pool:
                    for memory in each.private:
                        spoil(memory)
            self._submitted += 1
            self.replays += 1
            for work, before in graph.calls if self.has_numbers and self.computes else ():
                for old, new in zip(before, _tensors(work()), strict=True):
                    if old.data_ptr() != new.data_ptr():  # not a view, nor computed in place
                        old.copy_(new)


DEVICE = Device()


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _caller() -> str:
    """The nearest function of the project."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("nybble."):
            return f"{name}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "a test"
