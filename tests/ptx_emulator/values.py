"""Numbers in registers, and an instruction's operands as numbers.

A register is an array of unsigned integers, one for each thread; a predicate one of booleans.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from machine import Array, Unit
from program import Operand, Program, Statement

_KINDS = {
    **{f"{sign}{bits}": f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
}
DTYPES = {
    name: np.dtype(("int" if kind[0] == "s" else "uint") + kind[1:])
    for name, kind in _KINDS.items()
} | {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
VECTORS = (*HALVES, "f32x2")  # their numbers are ``(threads, 1 or 2)``
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def literal(text: str, dtype: np.dtype) -> Array:
    """A constant: ``12``, ``0x1f``, ``0f3F800000`` (float32 bits) or ``0d…`` (float64 bits)."""
    if text[:2] in ("0f", "0d"):
        return np.array([int(text[2:], 16)], np.uint32 if text[1] == "f" else np.uint64).view(dtype)
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "f":
        return np.array([value], dtype)
    return np.array([value % (1 << 8 * dtype.itemsize)], UNSIGNED[dtype.itemsize]).view(dtype)


def is_literal(text: str) -> bool:
    return text.lstrip("-")[:1].isdigit()


Reader = Callable[[Unit], Array]


def reader(operand: Operand, kind: str, program: Program) -> Reader:
    """Reads the operand as ``kind``; 16-bit floats as float64 ``(threads, 1 or 2)``.

    Pairs of float32 ``(threads, 2)``.

    A constant has one value for all threads.
    """
    assert isinstance(operand, str)
    if kind in HALVES:
        bits = reader(operand, "b32" if kind.endswith("x2") else "b16", program)
        return lambda unit: widen(bits(unit), kind)
    if kind == "f32x2":
        pairs = reader(operand, "b64", program)
        return lambda unit: np.ascontiguousarray(pairs(unit))[:, None].view(np.float32)
    dtype = DTYPES[kind]
    if operand == "global_smem" or is_literal(operand):
        constant = literal("0" if operand == "global_smem" else operand, dtype)
        return lambda unit: constant
    width = program.width(operand)
    narrower = UNSIGNED[dtype.itemsize] if width != dtype.itemsize else None
    # Of a load no thread has done: whoever uses it gets NaN, or minus one.
    unset = np.array([(1 << 8 * width) - 1], UNSIGNED[width])

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
    """Registers of 16-bit floats, rounded to the nearest, of float64 ``(threads, 1 or 2)``.

    Or of pairs of float32.
    """
    if kind == "f32x2":
        return np.ascontiguousarray(values).view(np.uint64)[:, 0]
    if kind.startswith("bf16"):
        bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> np.uint32(16)
        halves = np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)
    else:
        halves = values.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(halves).view(np.uint16 if values.shape[1] == 1 else np.uint32)[:, 0]


def bits_of(values: Array) -> Array:
    return values if values.dtype == bool else values.view(UNSIGNED[values.dtype.itemsize])


def kind_of(statement: Statement) -> str:
    """The last part that names a type."""
    return next(p for p in reversed(statement.parts) if p in DTYPES or p in VECTORS or p == "pred")


def predicate(unit: Unit, operand: Operand) -> Array:
    assert isinstance(operand, str)
    return np.array([int(operand) != 0]) if is_literal(operand) else unit.registers[operand]


def as_wide(bits: Array, kind: str, width: int) -> Array:
    """A number in a wider register, its sign kept where it has one."""
    if bits.dtype.itemsize == width:
        return bits
    value = bits.view(DTYPES[kind])
    return value.astype(f"{value.dtype.kind}{width}").view(UNSIGNED[width])
