"""Runs a kernel's PTX on arrays that hold a register of many threads.

Blocks run one after another, in any order. Where one counts what it has done, in global memory, it
stops in the middle of it, and some other block goes on: the others see what was really done.

Threads of a *unit* (the block, or a warp, or a warp group) run in step; where they part, those that
are behind run first, which brings them together again as ptxas' code would. Units run one after
another, each as far as the next barrier: what is right only in one order of warps, or needs a
barrier that is not there, comes out wrong in another order.

Asynchronous copies and products may land at once, or not before they are waited for; a kernel must
not care. A thread that waits for an mbarrier lets the other units run; what is late lands when they
all wait, and if they wait for nothing that is an error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from barriers import Barriers, NotYetError, Products
from memory import GlobalMemory, SharedMemory
from program import Program, Statement
from tensor_memory import TensorMemory

Array = np.ndarray
Mask = np.ndarray
Operation = Callable[["Unit", Mask | None], None]
WARP = 32


@dataclass(frozen=True)
class Timing:
    """Which of the orders a GPU may take is tried.

    unit: threads that run in step (0: the whole block). apart: the first warp does not, which goes
    ways of its own where it asks for products. backwards: the last units first. late:
    asynchronous work lands when it is waited for, not when it is asked for; what a GPU chooses (the
    thread that is elected, where tensor memory is) is chosen otherwise too. seed: of the blocks'
    order.
    """

    unit: int = 0
    apart: bool = False
    backwards: bool = False
    late: bool = True
    seed: int = 0

    def units(self, threads: int) -> list[range]:
        """The threads of a block that run in step."""
        size = self.unit or threads
        starts = [*range(0, threads, size)]
        if self.apart and min(size, threads) > WARP:
            starts.insert(1, WARP)
        ends = [*starts[1:], threads]
        found = [range(*each) for each in zip(starts, ends, strict=True)]
        return found[::-1] if self.backwards else found


class Kernel:
    """A compiled kernel: its program and what its statements do."""

    def __init__(
        self, program: Program, operation: Callable[[Statement, Program], Operation], shared: int
    ) -> None:
        self.program = program
        self.shared = shared
        self._names = program.names
        self._operations = [
            None if s.parts[0] in _CONTROL else operation(s, program) for s in program.statements
        ]

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[Array],
        memory: GlobalMemory,
        timing: Timing,
    ) -> None:
        """Run every block. arguments: one array of one value for each parameter."""
        if len(arguments) != len(self.program.parameters):
            raise ValueError(
                f"{len(arguments)} arguments for {len(self.program.parameters)} parameters"
            )
        parameters = dict(zip(self.program.parameters, arguments, strict=True))
        blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        pick = random.Random(timing.seed)
        left = [self._run_block(block, grid, parameters, memory, timing) for block in blocks]
        while left:
            number = pick.randrange(len(left))
            if next(left[number], "ended") == "ended":
                left.pop(number)

    def _run_block(
        self,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: dict[str, Array],
        memory: GlobalMemory,
        timing: Timing,
    ) -> Iterator[None]:
        """A block's run, in pieces that end where it has counted something."""
        shared = Block(memory, self.shared, timing.late)
        special = {f"%ctaid.{axis}": block[i] for i, axis in enumerate("xyz")}
        special |= {f"%nctaid.{axis}": grid[i] for i, axis in enumerate("xyz")}
        units = [
            Unit(threads.start, len(threads), self.program, parameters, special, shared)
            for threads in timing.units(self.program.threads)
        ]
        while units:
            yield from self._run_to_barrier(units, shared)
            done = [unit for unit in units if unit.done]
            if done and len(done) < len(units):
                raise RuntimeError("some threads ended while others wait at a barrier")
            units = [unit for unit in units if not unit.done]
        shared.products.finish()
        shared.tensor.finish()

    def _run_to_barrier(self, units: list[Unit], block: Block) -> Iterator[None]:
        waiting = units
        while waiting:
            moved = []
            for unit in waiting:
                moved.append(unit.run(self._operations, self._names))
                if unit.counted:
                    yield
            waiting = [unit for unit in waiting if unit.waits]
            if waiting and not any(moved) and not block.products.land():
                raise RuntimeError("a wait that never ends")


_CONTROL = ("bra", "ret", "exit", "bar", "barrier")


class Block:
    """What the threads of a block share."""

    def __init__(self, memory: GlobalMemory, shared: int, late: bool) -> None:
        self.memory = memory
        self.shared = SharedMemory(shared)
        self.tensor = TensorMemory(first=not late)
        self.barriers = Barriers(self.shared)
        self.products = Products(late)
        self.late = late


class Unit:
    """Threads that run in step, and their registers."""

    def __init__(
        self,
        first: int,
        size: int,
        program: Program,
        parameters: dict[str, Array],
        special: dict[str, int],
        block: Block,
    ) -> None:
        self.first = first
        self.size = size
        self.program = program
        self.parameters = parameters
        self.block = block
        self.memory = block.memory
        self.shared = block.shared
        self.late = block.late
        self.registers: dict[str, Array] = {
            name: np.full(size, value, np.uint32) for name, value in special.items()
        }
        threads = np.arange(first, first + size, dtype=np.uint32)
        self.registers |= {"%tid.x": threads, "%laneid": threads % WARP}
        self.copies = Pending()
        self.products = Pending()
        self.stores = Pending()  # to tensor memory
        self.loads = Loads()  # from there
        self.waits = False
        self.counted = False
        self.done = False
        self._groups: dict[int, Mask | None] = {0: None}
        self._arrived: dict[int, Mask | None] = {}  # at a barrier
        self._ended = False

    def write(self, name: str, value: Array, mask: Mask | None) -> None:
        """Set a register of the threads in ``mask`` (None: of all)."""
        if len(value) != self.size:
            value = np.broadcast_to(value, (self.size,))
        if mask is not None and name in self.registers:
            value = np.where(mask, value, self.registers[name])
        self.registers[name] = value

    def run(self, operations: Sequence[Operation | None], names: Sequence[frozenset[str]]) -> bool:
        """To the next barrier, or the end, or a wait, or a count. Whether anything was done."""
        statements = self.program.statements
        self.waits = self.counted = moved = False
        while self._groups:
            at = min(self._groups)
            mask = self._groups.pop(at)
            rejoin = min(self._groups, default=len(statements) + 1)
            while at < rejoin:
                operation = operations[at]
                if self.loads.waiting:
                    self.loads.land(names[at])
                guarded = self._guarded(statements[at], mask)
                if operation is not None:
                    if guarded is None or guarded.any():
                        try:
                            operation(self, guarded)
                        except NotYetError:
                            self._join(at, mask)
                            self.waits = True
                            return moved
                    at += 1
                    moved = True
                    if statements[at - 1].parts[0] == "atom" and (guarded is None or guarded.any()):
                        self._join(at, mask)
                        self.waits = self.counted = True
                        return moved
                    continue
                match statements[at].parts[0]:
                    case "bra":
                        target = self.program.labels[str(statements[at].operands[0])]
                        goes = self._all() if guarded is None else guarded
                        stays = (self._all() if mask is None else mask) & ~goes
                        if goes.any():
                            self._join(target, goes)
                        if stays.any():
                            self._join(at + 1, stays)
                        break
                    case "ret" | "exit":
                        if guarded is not mask:
                            raise NotImplementedError("a return under a predicate")
                        self._ended = True
                        break
                    case _:
                        self._arrive(statements[at], at + 1, guarded)
                        break
            else:
                self._join(at, mask)
        self._groups, self._arrived = self._arrived, {}
        self.done = not self._groups
        if self._groups and self._ended:
            raise RuntimeError("some threads ended while others wait at a barrier")
        return True

    def _arrive(self, statement: Statement, after: int, mask: Mask | None) -> None:
        """At a barrier: others, who took another branch, have to come first."""
        if mask is not None and (mask.reshape(-1, WARP) != mask[::WARP, None]).any():
            raise RuntimeError(f"a part of a warp at {statement.text}")
        self._join(after, mask, self._arrived)

    def _all(self) -> Mask:
        return np.ones(self.size, bool)

    def _guarded(self, statement: Statement, mask: Mask | None) -> Mask | None:
        if statement.guard is None:
            return mask
        name, negated = statement.guard
        own = ~self.registers[name] if negated else self.registers[name]
        own = own if mask is None else own & mask
        return None if own.all() else own

    def _join(
        self, at: int, mask: Mask | None, groups: dict[int, Mask | None] | None = None
    ) -> None:
        groups = self._groups if groups is None else groups
        if at in groups:
            other = groups[at]
            mask = None if mask is None or other is None else mask | other
        groups[at] = None if mask is None or mask.all() else mask


class Pending:
    """Asynchronous work in groups, as ``commit_group`` and ``wait_group`` count them."""

    def __init__(self) -> None:
        self._open: list[Callable[[], None]] = []
        self._groups: list[list[Callable[[], None]]] = []

    def add(self, work: Callable[[], None], late: bool) -> None:
        if late:
            self._open.append(work)
        else:
            work()

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait(self, remaining: int) -> None:
        while len(self._groups) > remaining:
            for work in self._groups.pop(0):
                work()


class Loads:
    """Asynchronous loads: a register has its value when an instruction names it, if not before."""

    def __init__(self) -> None:
        self.waiting: list[tuple[frozenset[str], Callable[[], None]]] = []

    def add(self, names: frozenset[str], work: Callable[[], None], late: bool) -> None:
        if late:
            self.waiting.append((names, work))
        else:
            work()

    def land(self, names: frozenset[str] | None = None) -> None:
        """Those of any of these registers, or all."""
        due = [each for each in self.waiting if names is None or each[0] & names]
        self.waiting = [each for each in self.waiting if each not in due]
        for _, work in due:
            work()
