"""Runs a kernel's PTX, one block at a time, on arrays that hold a register of many threads.

Threads of a *unit* (the block, or a warp, or a warp group) run in step; where they part, those that
are behind run first, which brings them together again as ptxas' code would. Units run one after
another, each as far as the next barrier: what is right only in one order of warps, or needs a
barrier that is not there, comes out wrong in another order.

Asynchronous copies and products may land at once, or not before they are waited for; a kernel must
not care.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from memory import GlobalMemory, SharedMemory
from program import Program, Statement

Array = np.ndarray
Mask = np.ndarray
Operation = Callable[["Unit", Mask | None], None]
WARP = 32


@dataclass(frozen=True)
class Timing:
    """Which of the orders a GPU may take is tried.

    unit: threads that run in step (0: the whole block). backwards: the last units first. late:
    asynchronous work lands when it is waited for, not when it is asked for. seed: order of blocks.
    """

    unit: int = 0
    backwards: bool = False
    late: bool = True
    seed: int = 0


class Kernel:
    """A compiled kernel: its program and what its statements do."""

    def __init__(
        self, program: Program, operation: Callable[[Statement, Program], Operation], shared: int
    ) -> None:
        self.program = program
        self.shared = shared
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
        random.Random(timing.seed).shuffle(blocks)
        for block in blocks:
            self._run_block(block, grid, parameters, memory, timing)

    def _run_block(
        self,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: dict[str, Array],
        memory: GlobalMemory,
        timing: Timing,
    ) -> None:
        shared = SharedMemory(self.shared)
        size = min(timing.unit or self.program.threads, self.program.threads)
        special = {f"%ctaid.{axis}": block[i] for i, axis in enumerate("xyz")}
        special |= {f"%nctaid.{axis}": grid[i] for i, axis in enumerate("xyz")}
        units = [
            Unit(first, size, self.program, parameters, special, memory, shared, timing.late)
            for first in range(0, self.program.threads, size)
        ]
        if timing.backwards:
            units.reverse()
        while units:
            for unit in units:
                unit.run(self._operations)
            done = [unit for unit in units if unit.done]
            if done and len(done) < len(units):
                raise RuntimeError("some threads ended while others wait at a barrier")
            units = [unit for unit in units if not unit.done]


_CONTROL = ("bra", "ret", "exit", "bar", "barrier")


class Unit:
    """Threads that run in step, and their registers."""

    def __init__(
        self,
        first: int,
        size: int,
        program: Program,
        parameters: dict[str, Array],
        special: dict[str, int],
        memory: GlobalMemory,
        shared: SharedMemory,
        late: bool,
    ) -> None:
        self.size = size
        self.program = program
        self.parameters = parameters
        self.memory = memory
        self.shared = shared
        self.late = late
        self.registers: dict[str, Array] = {
            name: np.full(size, value, np.uint32) for name, value in special.items()
        }
        threads = np.arange(first, first + size, dtype=np.uint32)
        self.registers |= {"%tid.x": threads, "%laneid": threads % WARP}
        self.copies = Pending()
        self.products = Pending()
        self.done = False
        self._groups: dict[int, Mask | None] = {0: None}

    def write(self, name: str, value: Array, mask: Mask | None) -> None:
        """Set a register of the threads in ``mask`` (None: of all)."""
        if len(value) != self.size:
            value = np.broadcast_to(value, (self.size,))
        if mask is not None and name in self.registers:
            value = np.where(mask, value, self.registers[name])
        self.registers[name] = value

    def run(self, operations: Sequence[Operation | None]) -> None:
        """To the next barrier, or the end."""
        statements = self.program.statements
        while self._groups:
            at = min(self._groups)
            mask = self._groups.pop(at)
            rejoin = min(self._groups, default=len(statements) + 1)
            while at < rejoin:
                operation = operations[at]
                guarded = self._guarded(statements[at], mask)
                if operation is not None:
                    if guarded is None or guarded.any():
                        operation(self, guarded)
                    at += 1
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
                        break
                    case _:
                        if guarded is not None or self._groups:
                            raise RuntimeError(f"a part of the threads at {statements[at].text}")
                        self._groups = {at + 1: None}
                        return
            else:
                self._join(at, mask)
        self.done = True

    def _all(self) -> Mask:
        return np.ones(self.size, bool)

    def _guarded(self, statement: Statement, mask: Mask | None) -> Mask | None:
        if statement.guard is None:
            return mask
        name, negated = statement.guard
        own = ~self.registers[name] if negated else self.registers[name]
        own = own if mask is None else own & mask
        return None if own.all() else own

    def _join(self, at: int, mask: Mask | None) -> None:
        if at in self._groups:
            other = self._groups[at]
            mask = None if mask is None or other is None else mask | other
        self._groups[at] = None if mask is None or mask.all() else mask


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
