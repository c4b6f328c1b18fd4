"""Tensor cores and what feeds them: ldmatrix, stmatrix, mma, wgmma (PTX ISA 9.0, section 9.7).

Which lane holds which element is taken from the ISA's figures; sums are in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from machine import WARP, Array, Mask, Operation, Unit
from program import Address, Statement
from shared_matrices import Matrix, floats

WARP_GROUP = 4 * WARP


def _registers(unit: Unit, names: tuple[str, ...]) -> Array:
    return np.stack([unit.registers[name] for name in names])


def _whole(mask: Mask | None, statement: Statement) -> None:
    if mask is not None:
        raise NotImplementedError(f"a part of the threads at {statement.text}")


def _rows(unit: Unit, statement: Statement, count: int) -> Array:
    """Shared addresses of the ``8 · count`` rows of 16 bytes each warp names, ``(warps, rows)``."""
    address = next(o for o in statement.operands if isinstance(o, Address))
    base = unit.registers[address.base] + np.uint32(address.offset)
    return base.reshape(-1, WARP)[:, : 8 * count]


def _load_matrices(statement: Statement) -> Operation:
    """ldmatrix: 8 × 8 matrices of 16-bit elements, two neighbouring elements to a lane."""
    to = statement.operands[0]
    assert isinstance(to, tuple)

    def run(unit: Unit, mask: Mask | None) -> None:
        _whole(mask, statement)
        rows = unit.shared.load(_rows(unit, statement, len(to)), 16)
        matrices = rows.view(np.uint16).reshape(-1, len(to), 8, 8)
        if "trans" in statement.parts:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, len(to), WARP)
        for place, name in enumerate(to):
            unit.write(name, pairs[:, place].reshape(-1), None)

    return run


def _store_matrices(statement: Statement) -> Operation:
    """stmatrix: the reverse."""
    source = statement.operands[1]
    assert isinstance(source, tuple)

    def run(unit: Unit, mask: Mask | None) -> None:
        _whole(mask, statement)
        pairs = _registers(unit, source).reshape(len(source), -1, WARP).swapaxes(0, 1)
        matrices = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, len(source), 8, 8)
        if "trans" in statement.parts:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 8 * len(source), 16)
        unit.shared.store(_rows(unit, statement, len(source)), values)

    return run


def _operand_a(unit: Unit, names: tuple[str, ...], kind: str) -> Array:
    """``(warps, 16, 16)``: four registers of a lane, rows then columns 8 apart."""
    quarters = _registers(unit, names).reshape(4, -1, 8, 4)
    top_left, bottom_left, top_right, bottom_right = (floats(q, kind) for q in quarters)
    left = np.concatenate((top_left, bottom_left), 1)
    return np.concatenate((left, np.concatenate((top_right, bottom_right), 1)), 2)


def _sums(unit: Unit, names: tuple[str, ...], width: int) -> Array:
    """Accumulators of warps ``(warps, 16, width)``: of each 8 columns two in rows 8 apart."""
    values = _registers(unit, names).view(np.float32)
    blocks = values.reshape(width // 8, 2, 2, -1, 8, 4)  # columns, row half, pair, warp, row, place
    return blocks.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, width)


def _write_sums(unit: Unit, names: tuple[str, ...], sums: Array) -> None:
    width = sums.shape[2]
    blocks = sums.reshape(-1, 2, 8, width // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    bits = np.ascontiguousarray(blocks).view(np.uint32).reshape(len(names), -1)
    for name, value in zip(names, bits, strict=True):
        unit.write(name, value, None)


def _multiply_warps(statement: Statement) -> Operation:
    """mma.m16n8k16 with float32 sums."""
    to, a, b, c = statement.operands
    shape, kinds = statement.parts[3], statement.parts[-4:]
    if shape != "m16n8k16" or kinds[0] != "f32" or kinds[3] != "f32":
        raise NotImplementedError(statement.text)
    assert isinstance(to, tuple)
    assert isinstance(a, tuple)
    assert isinstance(b, tuple)
    assert isinstance(c, tuple)

    def run(unit: Unit, mask: Mask | None) -> None:
        _whole(mask, statement)
        left = _operand_a(unit, a, kinds[1])
        halves = _registers(unit, b).reshape(2, -1, 8, 4)
        right = np.concatenate([floats(half, kinds[2]) for half in halves], 2)  # (warps, n, k)
        sums = _sums(unit, c, 8) + left @ right.swapaxes(1, 2)
        _write_sums(unit, to, sums)

    return run


_SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a swizzled row for bits 62 and 63


def _shared_matrix(unit: Unit, descriptor: int, size: int, transposed: bool, kind: str) -> Array:
    """A wgmma operand in shared memory as ``(size, 16)``, ``size`` the dimension that is kept."""
    matrix = Matrix.of(descriptor, _SPANS[descriptor >> 62 & 3], transposed)
    return matrix.read(unit.shared, size, kind)


def _multiply_warp_groups(statement: Statement) -> Operation:
    """wgmma: asynchronous products of four warps, m64 × n × k16."""
    match statement.parts[1]:
        case "fence":
            return lambda unit, mask: None
        case "commit_group":
            return lambda unit, mask: unit.products.commit()
        case "wait_group":
            remaining = int(str(statement.operands[0]))
            return lambda unit, mask: unit.products.wait(remaining)
    to, a, b, add, sign_a, sign_b, *transposed = statement.operands
    found = re.search(r"m64n(\d+)k16\.f32\.(b?f16)\.(b?f16)", statement.opcode)
    if found is None or (sign_a, sign_b) != ("1", "1"):
        raise NotImplementedError(statement.text)
    width, kind_a, kind_b = int(found[1]), found[2], found[3]
    assert isinstance(to, tuple)
    assert isinstance(b, str)

    def run(unit: Unit, mask: Mask | None) -> None:
        _whole(mask, statement)
        if unit.size % WARP_GROUP:
            raise RuntimeError("wgmma in units that are no warp groups")
        groups = range(0, unit.size, WARP_GROUP)
        held = _operand_a(unit, a, kind_a).reshape(-1, 64, 16) if isinstance(a, tuple) else None
        registers = dict(unit.registers)
        adds = int(add) if str(add).lstrip("-").isdigit() else bool(registers[str(add)][0])

        def multiply() -> None:
            left = held
            if left is None:
                left = np.stack(
                    [
                        _shared_matrix(
                            unit, int(registers[str(a)][g]), 64, transposed[0] == "1", kind_a
                        )
                        for g in groups
                    ]
                )
            right = np.stack(
                [
                    _shared_matrix(unit, int(registers[b][g]), width, transposed[-1] == "1", kind_b)
                    for g in groups
                ]
            )
            product = left @ right.swapaxes(1, 2)
            if adds:
                product += _sums(unit, to, width).reshape(product.shape)
            _write_sums(unit, to, product.reshape(-1, 16, width))

        unit.products.add(multiply, unit.late)

    return run


OPERATIONS: dict[str, Callable[[Statement], Operation]] = {
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "mma": _multiply_warps,
    "wgmma": _multiply_warp_groups,
}
