"""What each PTX instruction does (PTX ISA 9.0), for all threads of a unit at once.

A register is an array of unsigned integers, one for each thread; a predicate one of booleans. An
instruction that is not here is an error.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensor_cores
import torch
from machine import WARP, Array, Mask, Operation, Unit
from program import Address, Operand, Program, Statement

_KINDS = {
    **{f"{sign}{bits}": f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
}
DTYPES = {
    name: np.dtype(("int" if kind[0] == "s" else "uint") + kind[1:])
    for name, kind in _KINDS.items()
} | {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def operation(statement: Statement, program: Program) -> Operation:
    """What ``statement`` does to a unit, under a mask."""
    base = statement.parts[0]
    if base in _NOTHING or (base == "bar" and "warp" in statement.parts):
        return lambda unit, mask: None
    if base in tensor_cores.OPERATIONS:
        return tensor_cores.OPERATIONS[base](statement)
    if base in _SPECIAL:
        return _SPECIAL[base](statement, program)
    if base in _ELEMENTWISE:
        return _elementwise(statement, program)
    raise NotImplementedError(statement.text)


# Memory between threads is in order here, and nothing is fetched ahead.
_NOTHING = ("fence", "prefetch", "griddepcontrol", "membar")


# ---------------------------------------------------------------- operands


def literal(text: str, dtype: np.dtype) -> Array:
    """A constant: ``12``, ``0x1f``, ``0f3F800000`` (float32 bits) or ``0d…`` (float64 bits)."""
    if text[:2] in ("0f", "0d"):
        return np.array([int(text[2:], 16)], np.uint32 if text[1] == "f" else np.uint64).view(dtype)
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "f":
        return np.array([value], dtype)
    return np.array([value % (1 << 8 * dtype.itemsize)], _UNSIGNED[dtype.itemsize]).view(dtype)


def is_literal(text: str) -> bool:
    return text.lstrip("-")[:1].isdigit()


Reader = Callable[[Unit], Array]


def reader(operand: Operand, kind: str, program: Program) -> Reader:
    """Reads the operand as ``kind``; 16-bit floats as float64 ``(threads, 1 or 2)``.

    A constant has one value for all threads.
    """
    assert isinstance(operand, str)
    if kind in _HALVES:
        bits = reader(operand, "b32" if kind.endswith("x2") else "b16", program)
        return lambda unit: widen(bits(unit), kind)
    dtype = DTYPES[kind]
    if operand == "global_smem" or is_literal(operand):
        constant = literal("0" if operand == "global_smem" else operand, dtype)
        return lambda unit: constant
    width = program.width(operand)
    narrower = _UNSIGNED[dtype.itemsize] if width != dtype.itemsize else None
    # Of a load no thread has done: whoever uses it gets NaN, or minus one.
    unset = np.array([(1 << 8 * width) - 1], _UNSIGNED[width])

    def value(unit: Unit) -> Array:
        bits = unit.registers.get(operand, unset)
        return bits.view(dtype) if narrower is None else bits.astype(narrower).view(dtype)

    return value


def spread(values: Array, unit: Unit) -> Array:
    """One value for each thread."""
    return values if len(values) == unit.size else np.broadcast_to(values, (unit.size,))


def widen(bits: Array, kind: str) -> Array:
    """float64 ``(threads, 1 or 2)`` of registers of 16-bit floats."""
    halves = np.ascontiguousarray(bits)[:, None].view(np.uint16)
    if kind.startswith("bf16"):
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return halves.view(np.float16).astype(np.float64)


def narrow(values: Array, kind: str) -> Array:
    """Registers of 16-bit floats, rounded to the nearest, of float64 ``(threads, 1 or 2)``."""
    if kind.startswith("bf16"):
        bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> np.uint32(16)
        halves = np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)
    else:
        halves = values.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(halves).view(np.uint16 if values.shape[1] == 1 else np.uint32)[:, 0]


def bits_of(values: Array) -> Array:
    return values if values.dtype == bool else values.view(_UNSIGNED[values.dtype.itemsize])


def kind_of(statement: Statement) -> str:
    """The last part that names a type."""
    return next(p for p in reversed(statement.parts) if p in DTYPES or p in _HALVES or p == "pred")


# ---------------------------------------------------------------- elementwise


def _elementwise(statement: Statement, program: Program) -> Operation:
    base, kind = statement.parts[0], kind_of(statement)
    function = _ELEMENTWISE[base]
    to, *inputs = statement.operands
    assert isinstance(to, str)
    if kind == "pred":
        return lambda unit, mask: unit.write(
            to, function(statement, *(_predicate(unit, each) for each in inputs)), mask
        )
    # A wide product is added to a wide number.
    wide = base == "mad" and "wide" in statement.parts
    kinds = [kind, kind, f"{kind[0]}{2 * int(kind[1:])}"] if wide else [kind] * len(inputs)
    readers = [reader(each, k, program) for each, k in zip(inputs, kinds, strict=True)]

    def run(unit: Unit, mask: Mask | None) -> None:
        result = function(statement, *[read(unit) for read in readers])
        unit.write(to, narrow(result, kind) if kind in _HALVES else bits_of(result), mask)

    return run


def _predicate(unit: Unit, operand: Operand) -> Array:
    assert isinstance(operand, str)
    return np.array([int(operand) != 0]) if is_literal(operand) else unit.registers[operand]


def _multiply(statement: Statement, a: Array, b: Array) -> Array:
    if "wide" in statement.parts:
        return _doubled(a) * _doubled(b)
    if "hi" in statement.parts:
        bits = 8 * a.dtype.itemsize
        return ((_doubled(a) * _doubled(b)) >> bits).astype(a.dtype)
    return a * b


def _multiply_add(statement: Statement, a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    return _multiply(statement, a, b) + c


def _doubled(a: Array) -> Array:
    return a.astype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")


def _divide(statement: Statement, a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, 1, b)
    return ((np.sign(a) * np.sign(b)) * (np.abs(a) // np.abs(b))).astype(a.dtype)


def _remainder(statement: Statement, a: Array, b: Array) -> Array:
    return (a - _divide(statement, a, b) * b).astype(a.dtype)


def _shift_left(statement: Statement, a: Array, by: Array) -> Array:
    most, by = 8 * a.dtype.itemsize, bits_of(by)
    return np.where(by >= most, 0, a << (by % most).astype(a.dtype)).astype(a.dtype)


def _shift_right(statement: Statement, a: Array, by: Array) -> Array:
    most, by = 8 * a.dtype.itemsize, bits_of(by)
    past = np.where(a < 0, -1, 0).astype(a.dtype) if a.dtype.kind == "i" else a & 0
    return np.where(by >= most, past, a >> (by % most).astype(a.dtype)).astype(a.dtype)


def _funnel_shift(statement: Statement, low: Array, high: Array, by: Array) -> Array:
    """The high word of both shifted left, or the low one of both shifted right."""
    if "wrap" not in statement.parts:
        raise NotImplementedError(statement.text)
    both = high.astype(np.uint64) << np.uint64(32) | low
    by = (by & np.uint32(31)).astype(np.uint64)
    return ((both << by) >> np.uint64(32) if "l" in statement.parts else both >> by).astype(
        np.uint32
    )


def _field(statement: Statement, a: Array, position: Array, length: Array) -> Array:
    """bfe: ``length`` bits from ``position``, with the sign of the last one where it is signed."""
    bits = 8 * a.dtype.itemsize
    position, length = (bits_of(v).astype(np.int64) & 255 for v in (position, length))
    wide = a.astype(np.int64) if a.dtype.kind == "i" else a.astype(np.int64) & ((1 << bits) - 1)
    if (position + length > bits).any() or (length == 0).any():
        raise NotImplementedError(statement.text)
    field = (wide >> position) & ((np.int64(1) << length) - 1)
    if a.dtype.kind == "i":
        field = field - ((field >> (length - 1) & 1) << length)
    return field.astype(a.dtype)


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """The bit of ``table`` numbered by the three input bits, a's the highest."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for index in range(8):
        if table >> index & 1:
            terms = (v if index >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0)))
            first, second, third = terms
            out |= first & second & third
    return out


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes of the eight in b:a; a selector's top bit spreads the byte's sign."""
    if len(selector) == 1 and not int(selector[0]) & 0x8888:
        places = [int(selector[0]) >> 4 * place & 7 for place in range(4)]
        pair = np.stack(np.broadcast_arrays(a, b), -1).view(np.uint8)
        return np.ascontiguousarray(pair[:, places]).view(np.uint32)[:, 0]
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast_shapes(pool.shape, selector.shape), np.uint32)
    for place in range(4):
        nibble = selector >> np.uint32(4 * place) & np.uint32(15)
        byte = pool >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        spread = np.where(byte & np.uint64(128), 255, 0)
        chosen = np.where(nibble & np.uint32(8), spread, byte).astype(np.uint32)
        out |= chosen << np.uint32(8 * place)
    return out


def _population(statement: Statement, a: Array) -> Array:
    return np.array([int(v).bit_count() for v in a], np.uint32)


_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": lambda s, a, b: a + b,
    "sub": lambda s, a, b: a - b,
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _multiply_add,
    "div": _divide,
    "rem": _remainder,
    "min": lambda s, a, b: np.fmin(a, b),
    "max": lambda s, a, b: np.fmax(a, b),
    "abs": lambda s, a: np.abs(a),
    "neg": lambda s, a: -a,
    "not": lambda s, a: ~a,
    "and": lambda s, a, b: a & b,
    "or": lambda s, a, b: a | b,
    "xor": lambda s, a, b: a ^ b,
    "shl": _shift_left,
    "shr": _shift_right,
    "shf": _funnel_shift,
    "bfe": _field,
    "lop3": lambda s, a, b, c, table: lop3(a, b, c, int(table[0])),
    "prmt": lambda s, a, b, selector: prmt(a, b, selector),
    "popc": _population,
    "ex2": lambda s, a: np.exp2(a),
    "lg2": lambda s, a: np.log2(a),
    "sqrt": lambda s, a: np.sqrt(a),
    "rsqrt": lambda s, a: 1 / np.sqrt(a),
    "rcp": lambda s, a: 1 / a,
}


# ---------------------------------------------------------------- the rest


def _move(statement: Statement, program: Program) -> Operation:
    """mov: a register, or several narrow ones to or from a wide one."""
    to, source = statement.operands
    kind = kind_of(statement)
    if isinstance(source, tuple):
        assert isinstance(to, str)
        each = f"b{8 * program.width(to) // len(source)}"
        readers = [reader(name, each, program) for name in source]

        def join(unit: Unit, mask: Mask | None) -> None:
            parts = [spread(read(unit), unit) for read in readers]
            wide = np.ascontiguousarray(np.stack(parts, -1)).view(_UNSIGNED[program.width(to)])
            unit.write(to, wide[:, 0], mask)

        return join
    if isinstance(to, tuple):
        whole = reader(source, kind, program)

        def split(unit: Unit, mask: Mask | None) -> None:
            wide = whole(unit)
            width = wide.dtype.itemsize // len(to)
            parts = np.ascontiguousarray(wide)[:, None].view(_UNSIGNED[width])
            for name, part in zip(to, parts.T, strict=True):
                if name == "_":
                    continue
                unit.write(name, _as_wide(part, f"b{8 * width}", program.width(name)), mask)

        return split
    assert isinstance(to, str)
    if kind == "pred":
        return lambda unit, mask: unit.write(to, _predicate(unit, source), mask)
    value = reader(source, kind, program)
    return lambda unit, mask: unit.write(to, bits_of(value(unit)), mask)


def _select(statement: Statement, program: Program) -> Operation:
    to, a, b, condition = statement.operands
    kind = kind_of(statement)
    first, second = reader(a, kind, program), reader(b, kind, program)
    assert isinstance(to, str)

    def run(unit: Unit, mask: Mask | None) -> None:
        chosen = np.where(_predicate(unit, condition), first(unit), second(unit))
        unit.write(to, bits_of(chosen), mask)

    return run


_COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal} | {
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _compare(statement: Statement, program: Program) -> Operation:
    """setp: false where either is NaN, or with a ``u`` at its name's end true."""
    to, a, b = statement.operands
    name, kind = statement.parts[1], kind_of(statement)
    assert isinstance(to, str)
    floats = kind.startswith("f")
    unordered = floats and name.endswith("u")
    compare = _COMPARISONS[name[:2]]
    left, right = reader(a, kind, program), reader(b, kind, program)

    def run(unit: Unit, mask: Mask | None) -> None:
        x, y = left(unit), right(unit)
        result = compare(x, y)
        if floats:
            nan = np.isnan(x) | np.isnan(y)
            result = result | nan if unordered else result & ~nan
        unit.write(to, result, mask)

    return run


def _convert(statement: Statement, program: Program) -> Operation:
    to, *sources = statement.operands
    target, source = statement.parts[-2:]
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    integral = next((rounding[p] for p in statement.parts if p in rounding), None)
    readers = [reader(each, "b16" if source == "e4m3x2" else source, program) for each in sources]
    assert isinstance(to, str)

    def run(unit: Unit, mask: Mask | None) -> None:
        if target.endswith("x2"):
            if source == "e4m3x2":  # two numbers in a register
                value = _from_8_bits(readers[0](unit))
            else:  # the first operand is the high half
                wide = [read(unit).astype(np.float64) for read in readers]
                value = np.stack(np.broadcast_arrays(wide[1], wide[0]), -1)
            to_bits = _to_8_bits(value) if target == "e4m3x2" else narrow(value, target)
            unit.write(to, to_bits, mask)
            return
        value = readers[0](unit)
        if target in _HALVES:
            value = value if source in _HALVES else value.astype(np.float64)[:, None]
            unit.write(to, narrow(value, target), mask)
            return
        value = value[:, 0] if source in _HALVES else value
        dtype = DTYPES[target]
        if dtype.kind == "f" and integral is not None:
            value = integral(value)
        elif dtype.kind != "f" and value.dtype.kind == "f":
            assert integral is not None, statement.text
            most = np.iinfo(dtype)
            value = np.clip(integral(np.nan_to_num(value.astype(np.float64))), most.min, most.max)
        unit.write(to, _as_wide(bits_of(value.astype(dtype)), target, program.width(to)), mask)

    return run


def _as_wide(bits: Array, kind: str, width: int) -> Array:
    """A number in a wider register, its sign kept where it has one."""
    if bits.dtype.itemsize == width:
        return bits
    value = bits.view(DTYPES[kind])
    return value.astype(f"{value.dtype.kind}{width}").view(_UNSIGNED[width])


def _from_8_bits(bits: Array) -> Array:
    pairs = np.ascontiguousarray(bits)[:, None].view(np.uint8)
    return torch.from_numpy(pairs).view(torch.float8_e4m3fn).double().numpy()


def _to_8_bits(values: Array) -> Array:
    clipped = torch.from_numpy(np.clip(values, -448, 448)).float().to(torch.float8_e4m3fn)
    return clipped.view(torch.uint8).numpy().view(np.uint16)[:, 0]


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
            unit.write(names[0], _as_wide(bits_of(value), kind, program.width(names[0])), mask)

        return parameter
    where = addresses(address, space, program)

    def run(unit: Unit, mask: Mask | None) -> None:
        at = where(unit)
        memory = unit.memory if space == "global" else unit.shared
        found = memory.load(at if mask is None else at[mask], width * len(names))
        parts = np.ascontiguousarray(found).view(_UNSIGNED[width])
        for name, part in zip(names, parts.T, strict=True):
            value = _as_wide(part, kind, program.width(name))
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
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[statement.parts[2]]
    value = reader(source, kind, program)
    assert isinstance(to, str)

    def run(unit: Unit, mask: Mask | None) -> None:
        _whole_warps(mask, statement)
        values = spread(value(unit), unit).reshape(-1, WARP)
        total = function.reduce(values, axis=1, dtype=values.dtype)
        unit.write(to, bits_of(np.repeat(total, WARP)), mask)

    return run


_SPECIAL: dict[str, Callable[[Statement, Program], Operation]] = {
    "mov": _move,
    "selp": _select,
    "setp": _compare,
    "cvt": _convert,
    "ld": _load,
    "st": _store,
    "cp": _asynchronous,
    "atom": _add_atomically,
    "shfl": _shuffle,
    "redux": _reduce,
}
