"""mbarriers (PTX ISA 9.0, 9.7.13.15), and products that arrive on them when they are done."""

from __future__ import annotations

from collections.abc import Callable

from memory import SharedMemory

Work = Callable[[], None]
_SIZE = 8  # bytes


class NotYetError(Exception):
    """A thread has to wait for what others do; its instruction is to be tried again."""


class Barrier:
    """Phases of ``count`` arrivals each."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise RuntimeError(f"an mbarrier of {count} arrivals")
        self._count = self._missing = count
        self._phase = 0
        self.valid = True

    def arrive(self) -> None:
        if not self.valid:
            raise RuntimeError("an arrival at an mbarrier that is no longer one")
        self._missing -= 1
        if not self._missing:
            self._missing = self._count
            self._phase += 1

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity is over: the one before the current one."""
        return self._phase % 2 != parity


class Barriers:
    """A block's, at their addresses. Nothing else may touch the bytes of a valid one."""

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self._valid: dict[int, Barrier] = {}

    def initialise(self, address: int, count: int) -> None:
        if address in self._valid or address % _SIZE:
            raise RuntimeError(f"an mbarrier initialised at {address:#x}")
        self._shared.reserve(address, _SIZE)
        self._valid[address] = Barrier(count)

    def invalidate(self, address: int) -> None:
        self.at(address).valid = False
        del self._valid[address]
        self._shared.release(address)

    def at(self, address: int) -> Barrier:
        if address not in self._valid:
            raise RuntimeError(f"no mbarrier at {address:#x}, or no longer one")
        return self._valid[address]


class Products:
    """Asynchronous products of a block's threads, in the order each thread asked for them.

    late: they are not made before there is nothing else to do than to wait for them.
    """

    def __init__(self, late: bool) -> None:
        self._late = late
        self._open: dict[int, list[Work]] = {}
        self._committed: list[list[Work]] = []

    def add(self, thread: int, work: Work) -> None:
        if self._late:
            self._open.setdefault(thread, []).append(work)
        else:
            work()

    def commit(self, thread: int, barrier: Barrier) -> None:
        """Arrives on ``barrier`` after all that this thread has asked for."""
        self.add(thread, barrier.arrive)
        if self._late:
            self._committed.append(self._open.pop(thread))

    def land(self) -> bool:
        """What was committed first is done. False: nothing was."""
        if not self._committed:
            return False
        for work in self._committed.pop(0):
            work()
        return True

    def finish(self) -> None:
        """Where tensor memory goes away."""
        if self._committed or self._open:
            raise RuntimeError("products that nobody waited for")
