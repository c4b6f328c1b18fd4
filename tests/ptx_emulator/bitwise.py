"""Shifts, fields and permutations of bits, for all threads at once."""

from __future__ import annotations

import numpy as np
from machine import Array
from program import Statement
from values import bits_of


def shift_left(statement: Statement, a: Array, by: Array) -> Array:
    most, by = 8 * a.dtype.itemsize, bits_of(by)
    return np.where(by >= most, 0, a << (by % most).astype(a.dtype)).astype(a.dtype)


def shift_right(statement: Statement, a: Array, by: Array) -> Array:
    most, by = 8 * a.dtype.itemsize, bits_of(by)
    past = np.where(a < 0, -1, 0).astype(a.dtype) if a.dtype.kind == "i" else a & 0
    return np.where(by >= most, past, a >> (by % most).astype(a.dtype)).astype(a.dtype)


def funnel_shift(statement: Statement, low: Array, high: Array, by: Array) -> Array:
    """The high word of both shifted left, or the low one of both shifted right."""
    if "wrap" not in statement.parts:
        raise NotImplementedError(statement.text)
    both = high.astype(np.uint64) << np.uint64(32) | low
    by = (by & np.uint32(31)).astype(np.uint64)
    return ((both << by) >> np.uint64(32) if "l" in statement.parts else both >> by).astype(
        np.uint32
    )


def field(statement: Statement, a: Array, position: Array, length: Array) -> Array:
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


def population(statement: Statement, a: Array) -> Array:
    return np.array([int(v).bit_count() for v in a], np.uint32)
