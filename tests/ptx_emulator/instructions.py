"""What each PTX instruction does (PTX ISA 9.0), for all threads of a unit at once.

Here those that reach memory or other threads. An instruction that is nowhere is an error.
"""

from __future__ import annotations

from collections.abc import Callable

import blackwell
import mbarrier
import numpy as np
import per_thread
import tensor_cores
from machine import WARP, Mask, Operation, Unit
from program import Address, Operand, Program, Statement
from values import DTYPES, UNSIGNED, Reader, as_wide, bits_of, kind_of, literal, reader, spread


def operation(statement: Statement, program: Program) -> Operation:
    """What ``statement`` does to a unit, under a mask."""
    base = statement.parts[0]
    if statement.opcode.startswith("fence.proxy.async"):
        return lambda unit, mask: unit.shared.fence()
    if base in _NOTHING or (base == "bar" and "warp" in statement.parts):
        return lambda unit, mask: None
    if base in tensor_cores.OPERATIONS:
        return tensor_cores.OPERATIONS[base](statement)
    special = _SPECIAL | per_thread.SPECIAL
    if base in special:
        return special[base](statement, program)
    if base in per_thread.ELEMENTWISE:
        return per_thread.elementwise(statement, program)
    raise NotImplementedError(statement.text)


# Memory between threads is in order here, and nothing is fetched ahead.
_NOTHING = ("fence", "prefetch", "griddepcontrol", "membar")


def addresses(address: Operand, space: str, program: Program) -> Reader:
    """Where each thread's access goes: 64 bits to global memory, 32 to shared memory."""
    assert isinstance(address, Address)
    base = reader(address.base, _SPACES[space], program)
    offset = literal(str(address.offset), DTYPES[_SPACES[space]])
    return lambda unit: spread(base(unit) + offset, unit)


def _space(statement: Statement) -> str:
    return next(p.split("::")[0] for p in statement.parts if p.split("::")[0] in _SPACES)


_SPACES = {"global": "u64", "shared": "u32", "param": ""}


def _load(statement: Statement, program: Program) -> Operation:
    to, address = statement.operands
    kind, space = statement.parts[-1], _space(statement)
    names = to if isinstance(to, tuple) else (to,)
    assert isinstance(address, Address)
    width = DTYPES[kind].itemsize
    if space == "param":

        def parameter(unit: Unit, mask: Mask | None) -> None:
            value = unit.parameters[address.base].view(DTYPES[kind])
            unit.write(names[0], as_wide(bits_of(value), kind, program.width(names[0])), mask)

        return parameter
    where = addresses(address, space, program)

    def run(unit: Unit, mask: Mask | None) -> None:
        at = where(unit)
        memory = unit.memory if space == "global" else unit.shared
        found = memory.load(at if mask is None else at[mask], width * len(names))
        parts = np.ascontiguousarray(found).view(UNSIGNED[width])
        for name, part in zip(names, parts.T, strict=True):
            value = as_wide(part, kind, program.width(name))
            if mask is not None:
                whole = np.zeros(unit.size, value.dtype)
                whole[mask] = value
                value = whole
            unit.write(name, value, mask)

    return run


def _store(statement: Statement, program: Program) -> Operation:
    address, source = statement.operands
    kind, space = statement.parts[-1], _space(statement)
    names = source if isinstance(source, tuple) else (source,)
    where, readers = addresses(address, space, program), [reader(n, kind, program) for n in names]

    def run(unit: Unit, mask: Mask | None) -> None:
        at = where(unit)
        parts = [spread(read(unit), unit) for read in readers]
        values = np.ascontiguousarray(np.stack(parts, -1)).view(np.uint8)
        memory = unit.memory if space == "global" else unit.shared
        if mask is not None:
            at, values = at[mask], values[mask]
        memory.store(at, values)

    return run


def _asynchronous(statement: Statement, program: Program) -> Operation:
    """cp.async: copies to shared memory, and the groups they are waited for in."""
    match statement.parts[2]:
        case "commit_group":
            return lambda unit, mask: _together(unit.copies.commit, mask)
        case "wait_group":
            remaining = int(str(statement.operands[0]))
            return lambda unit, mask: _together(lambda: unit.copies.wait(remaining), mask)
        case "wait_all":
            return lambda unit, mask: _together(
                lambda: (unit.copies.commit(), unit.copies.wait(0)), mask
            )
    target, source, size, *taken = statement.operands
    width = int(str(size), 0)
    targets, sources = addresses(target, "shared", program), addresses(source, "global", program)
    counts = reader(taken[0] if taken else str(size), "u32", program)

    def run(unit: Unit, mask: Mask | None) -> None:
        to, at, count = targets(unit), sources(unit), spread(counts(unit), unit)
        if not np.isin(count, (0, width)).all():
            raise NotImplementedError(statement.text)
        active = np.ones(unit.size, bool) if mask is None else mask
        values = np.zeros((unit.size, width), np.uint8)
        reads = active & (count > 0)
        if reads.any():
            values[reads] = unit.memory.load(at[reads], width)
        unit.copies.add(lambda: unit.shared.store(to[active], values[active]), unit.late)

    return run


def _together(work: Callable[[], object], mask: Mask | None) -> None:
    if mask is not None:
        raise NotImplementedError("groups of copies of a part of the threads")
    work()


def _add_atomically(statement: Statement, program: Program) -> Operation:
    to, address, value = statement.operands
    assert isinstance(to, str)
    if statement.parts[-2:] not in (["add", "u32"], ["add", "s32"]):
        raise NotImplementedError(statement.text)
    where, addend = addresses(address, "global", program), reader(value, "u32", program)

    def run(unit: Unit, mask: Mask | None) -> None:
        at, added = where(unit), spread(addend(unit), unit)
        before = np.zeros(unit.size, np.uint32)
        for thread in range(unit.size) if mask is None else np.flatnonzero(mask):
            one = slice(thread, thread + 1)
            before[one] = unit.memory.load(at[one], 4).view(np.uint32)[:, 0]
            total = np.ascontiguousarray(before[one] + added[one])
            unit.memory.store(at[one], total[:, None].view(np.uint8))
        unit.write(to, before, mask)

    return run


def _whole_warps(mask: Mask | None, statement: Statement) -> None:
    if mask is not None and (mask.reshape(-1, WARP).any(1) != mask.reshape(-1, WARP).all(1)).any():
        raise NotImplementedError(f"a part of a warp at {statement.text}")


def _shuffle(statement: Statement, program: Program) -> Operation:
    """shfl.sync: a lane's value of another lane of its warp, or its own where that is outside."""
    to, source, by, bounds, _ = statement.operands
    mode = statement.parts[2]
    assert isinstance(to, str)
    lane = np.arange(WARP)
    value, steps = reader(source, "b32", program), reader(by, "u32", program)
    clamp = int(literal(str(bounds), DTYPES["u32"])[0])

    def run(unit: Unit, mask: Mask | None) -> None:
        _whole_warps(mask, statement)
        values = spread(value(unit), unit).reshape(-1, WARP)
        step = spread(steps(unit), unit).reshape(-1, WARP).astype(np.int64) & 31
        segment, most = clamp >> 8 & 31, clamp & 31
        highest = (lane & segment) | (most & ~segment)
        match mode:
            case "up":
                other = lane - step
                inside = other >= highest
            case "down":
                other = lane + step
                inside = other <= highest
            case "bfly":
                other = lane ^ step
                inside = other <= highest
            case _:
                other = (lane & segment) | (step & ~segment)
                inside = other <= highest
        other = np.where(inside, other, lane)
        unit.write(to, np.take_along_axis(values, other, 1).reshape(-1), mask)

    return run


def _reduce(statement: Statement, program: Program) -> Operation:
    to, source, _ = statement.operands
    kind = kind_of(statement)
    function = {"add": np.add, "min": np.fmin, "max": np.fmax}[statement.parts[2]]
    value = reader(source, kind, program)
    absolute = "abs" in statement.parts  # of Blackwell's float32
    assert isinstance(to, str)

    def run(unit: Unit, mask: Mask | None) -> None:
        _whole_warps(mask, statement)
        values = spread(value(unit), unit).reshape(-1, WARP)
        if absolute:
            values = np.abs(values)
        total = function.reduce(values, axis=1, dtype=values.dtype)
        unit.write(to, bits_of(np.repeat(total, WARP)), mask)

    return run


_SPECIAL: dict[str, Callable[[Statement, Program], Operation]] = {
    "ld": _load,
    "st": _store,
    "cp": _asynchronous,
    "atom": _add_atomically,
    "shfl": _shuffle,
    "redux": _reduce,
    "elect": mbarrier.elect,
    "mbarrier": mbarrier.barrier,
    "tcgen05": blackwell.fifth_generation,
}
