"""Instructions that take each thread's numbers and leave it one: arithmetic, bits, conversions."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import bitwise
import numpy as np
import torch
from machine import Array, Mask, Operation, Unit
from program import Program, Statement
from values import (
    DTYPES,
    HALVES,
    UNSIGNED,
    VECTORS,
    as_wide,
    bits_of,
    kind_of,
    narrow,
    predicate,
    reader,
    spread,
)


def elementwise(statement: Statement, program: Program) -> Operation:
    base, kind = statement.parts[0], kind_of(statement)
    function = ELEMENTWISE[base]
    to, *inputs = statement.operands
    assert isinstance(to, str)
    if sum(part in DTYPES or part in VECTORS for part in statement.parts) > 1:
        return _add_mixed(statement, program)
    if kind == "pred":
        return lambda unit, mask: unit.write(
            to, function(statement, *(predicate(unit, each) for each in inputs)), mask
        )
    # A wide product is added to a wide number.
    wide = base == "mad" and "wide" in statement.parts
    kinds = [kind, kind, f"{kind[0]}{2 * int(kind[1:])}"] if wide else [kind] * len(inputs)
    readers = [reader(each, k, program) for each, k in zip(inputs, kinds, strict=True)]

    def run(unit: Unit, mask: Mask | None) -> None:
        result = function(statement, *[read(unit) for read in readers])
        unit.write(to, narrow(result, kind) if kind in VECTORS else bits_of(result), mask)

    return run


def _add_mixed(statement: Statement, program: Program) -> Operation:
    """add.f32.f16: a number of 16 bits and one of 32 (9.7.5.1)."""
    to, a, c = statement.operands
    if statement.parts[:3] != ["add", "rn", "f32"] or len(statement.parts) != 4:
        raise NotImplementedError(statement.text)
    narrow_one, wide_one = reader(a, statement.parts[3], program), reader(c, "f32", program)

    def run(unit: Unit, mask: Mask | None) -> None:
        total = narrow_one(unit)[:, 0].astype(np.float32) + wide_one(unit)
        unit.write(str(to), bits_of(total), mask)

    return run


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


ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": lambda s, a, b: a + b,
    "sub": lambda s, a, b: a - b,
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _multiply_add,
    "div": _divide,
    "rem": _remainder,
    "min": lambda s, *values: reduce(np.fmin, values),
    "max": lambda s, *values: reduce(np.maximum if "NaN" in s.parts else np.fmax, values),
    "abs": lambda s, a: np.abs(a),
    "neg": lambda s, a: -a,
    "not": lambda s, a: ~a,
    "and": lambda s, a, b: a & b,
    "or": lambda s, a, b: a | b,
    "xor": lambda s, a, b: a ^ b,
    "shl": bitwise.shift_left,
    "shr": bitwise.shift_right,
    "shf": bitwise.funnel_shift,
    "bfe": bitwise.field,
    "lop3": lambda s, a, b, c, table: bitwise.lop3(a, b, c, int(table[0])),
    "prmt": lambda s, a, b, selector: bitwise.prmt(a, b, selector),
    "popc": bitwise.population,
    "ex2": lambda s, a: np.exp2(a),
    "lg2": lambda s, a: np.log2(a),
    "sqrt": lambda s, a: np.sqrt(a),
    "rsqrt": lambda s, a: 1 / np.sqrt(a),
    "rcp": lambda s, a: 1 / a,
}


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
            wide = np.ascontiguousarray(np.stack(parts, -1)).view(UNSIGNED[program.width(to)])
            unit.write(to, wide[:, 0], mask)

        return join
    if isinstance(to, tuple):
        whole = reader(source, kind, program)

        def split(unit: Unit, mask: Mask | None) -> None:
            wide = whole(unit)
            width = wide.dtype.itemsize // len(to)
            parts = np.ascontiguousarray(wide)[:, None].view(UNSIGNED[width])
            for name, part in zip(to, parts.T, strict=True):
                if name == "_":
                    continue
                unit.write(name, as_wide(part, f"b{8 * width}", program.width(name)), mask)

        return split
    assert isinstance(to, str)
    if kind == "pred":
        return lambda unit, mask: unit.write(to, predicate(unit, source), mask)
    value = reader(source, kind, program)
    return lambda unit, mask: unit.write(to, bits_of(value(unit)), mask)


def _select(statement: Statement, program: Program) -> Operation:
    to, a, b, condition = statement.operands
    kind = kind_of(statement)
    first, second = reader(a, kind, program), reader(b, kind, program)
    assert isinstance(to, str)

    def run(unit: Unit, mask: Mask | None) -> None:
        chosen = np.where(predicate(unit, condition), first(unit), second(unit))
        unit.write(to, bits_of(chosen), mask)

    return run


_COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal} | {
    "gt": np.greater,
    "ge": np.greater_equal,
    "nu": lambda x, y: np.True_,  # num: whether both are numbers
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
            elif source == "f16x2":
                value = readers[0](unit)
            else:  # the first operand is the high half
                wide = [read(unit).astype(np.float64) for read in readers]
                value = np.stack(np.broadcast_arrays(wide[1], wide[0]), -1)
            to_bits = _to_8_bits(value) if target == "e4m3x2" else narrow(value, target)
            unit.write(to, to_bits, mask)
            return
        value = readers[0](unit)
        if target in HALVES:
            value = value if source in HALVES else value.astype(np.float64)[:, None]
            unit.write(to, narrow(value, target), mask)
            return
        value = value[:, 0] if source in HALVES else value
        dtype = DTYPES[target]
        if dtype.kind == "f" and integral is not None:
            value = integral(value)
        elif dtype.kind != "f" and value.dtype.kind == "f":
            assert integral is not None, statement.text
            most = np.iinfo(dtype)
            value = np.clip(integral(np.nan_to_num(value.astype(np.float64))), most.min, most.max)
        unit.write(to, as_wide(bits_of(value.astype(dtype)), target, program.width(to)), mask)

    return run


def _from_8_bits(bits: Array) -> Array:
    pairs = np.ascontiguousarray(bits)[:, None].view(np.uint8)
    return torch.from_numpy(pairs).view(torch.float8_e4m3fn).double().numpy()


def _to_8_bits(values: Array) -> Array:
    clipped = torch.from_numpy(np.clip(values, -448, 448)).float().to(torch.float8_e4m3fn)
    return clipped.view(torch.uint8).numpy().view(np.uint16)[:, 0]


SPECIAL: dict[str, Callable[[Statement, Program], Operation]] = {
    "mov": _move,
    "selp": _select,
    "setp": _compare,
    "cvt": _convert,
}
