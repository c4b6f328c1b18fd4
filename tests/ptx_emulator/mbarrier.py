"""Waiting for products: mbarrier and elect (PTX ISA 9.0, 9.7.13.15 and 9.7.13.14)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from barriers import NotYetError
from machine import WARP, Array, Mask, Operation, Unit
from program import Address, Program, Statement
from values import reader, spread


def active_threads(unit: Unit, mask: Mask | None) -> Array:
    return np.arange(unit.size) if mask is None else np.flatnonzero(mask)


def whole_warps(unit: Unit, mask: Mask | None, statement: Statement) -> Array:
    """Which warps of the unit take part; all their lanes have to."""
    lanes = np.ones(unit.size, bool) if mask is None else mask
    warps = lanes.reshape(-1, WARP)
    if (warps.any(1) != warps.all(1)).any():
        raise RuntimeError(f"a part of a warp at {statement.text}")
    return np.flatnonzero(warps[:, 0])


def addresses(operand: object, program: Program) -> Callable[[Unit], Array]:
    """uint32 addresses, of shared or tensor memory, of each thread."""
    assert isinstance(operand, Address)
    base, offset = reader(operand.base, "u32", program), np.uint32(operand.offset)
    return lambda unit: spread(base(unit) + offset, unit)


def elect(statement: Statement, program: Program) -> Operation:
    """elect.sync: any lane of each warp, but always the same."""
    leader, chosen = str(statement.operands[0]).split("|")
    if statement.operands[1] != "-1":
        raise NotImplementedError(statement.text)

    def run(unit: Unit, mask: Mask | None) -> None:
        whole_warps(unit, mask, statement)
        lane = 0 if unit.late else WARP - 1
        unit.write(leader, np.full(unit.size, lane, np.uint32), mask)
        unit.write(chosen, np.arange(unit.size) % WARP == lane, mask)

    return run


def barrier(statement: Statement, program: Program) -> Operation:
    """mbarrier.init, inval and try_wait.parity, which is tried until the phase is over."""
    action = statement.parts[1]
    if action == "try_wait" and statement.parts[2] == "parity":
        to, address, by = statement.operands
        where, parities = addresses(address, program), reader(by, "u32", program)

        def wait(unit: Unit, mask: Mask | None) -> None:
            active, at, parity = (
                active_threads(unit, mask),
                where(unit),
                spread(parities(unit), unit),
            )
            for one in np.unique(np.stack((at[active], parity[active]), 1), axis=0):
                if not unit.block.barriers.at(int(one[0])).passed(int(one[1])):
                    raise NotYetError
            unit.write(str(to), np.ones(unit.size, bool), mask)

        return wait
    where = addresses(statement.operands[0], program)
    match action:
        case "init":
            count = int(str(statement.operands[1]))
            return lambda unit, mask: [
                unit.block.barriers.initialise(int(at), count)
                for at in where(unit)[active_threads(unit, mask)]
            ]
        case "inval":
            return lambda unit, mask: [
                unit.block.barriers.invalidate(int(at))
                for at in where(unit)[active_threads(unit, mask)]
            ]
    raise NotImplementedError(statement.text)
