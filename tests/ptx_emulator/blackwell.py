"""Fifth-generation tensor cores: tcgen05 (PTX ISA 9.0, section 9.7.16).

Where the text has only figures, the layouts are those of CUTLASS' ``tmem_frg``
(mma_traits_sm100.hpp). What is late and in which order is 9.7.16.6: products are done when the
mbarrier they were committed to is waited for; stores after ``wait::st``; loads when a register is
used (9.7.16.6.4.5) or after ``wait::ld``. ``tcgen05.fence`` is not asked for: Triton writes none, a
barrier stands in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from machine import WARP, Array, Mask, Operation, Unit
from mbarrier import active_threads, addresses, whole_warps
from program import Address, Program, Statement
from shared_matrices import DEPTH, Matrix, floats
from values import predicate, reader, spread


def fifth_generation(statement: Statement, program: Program) -> Operation:
    """tcgen05, as far as it is for one block: no cta_group::2."""
    action = statement.parts[1]
    if action not in _TCGEN05 or "cta_group::2" in statement.parts:
        raise NotImplementedError(statement.text)
    return _TCGEN05[action](statement, program)


def _one_warp(unit: Unit, mask: Mask | None, statement: Statement) -> int:
    """A thread of the only warp that takes part."""
    warps = whole_warps(unit, mask, statement)
    if len(warps) != 1:
        raise RuntimeError(f"{len(warps)} warps at {statement.text}")
    return int(warps[0]) * WARP


def _allocate(statement: Statement, program: Program) -> Operation:
    """9.7.16.7.1: one warp allocates, the address goes to shared memory."""
    where, columns = addresses(statement.operands[0], program), int(str(statement.operands[1]))

    def run(unit: Unit, mask: Mask | None) -> None:
        thread = _one_warp(unit, mask, statement)
        address = np.array([unit.block.tensor.allocate(columns)], np.uint32)
        unit.shared.store(where(unit)[thread : thread + 1], address[:, None].view(np.uint8))

    return run


def _deallocate(statement: Statement, program: Program) -> Operation:
    where = reader(statement.operands[0], "u32", program)
    columns = int(str(statement.operands[1]))

    def run(unit: Unit, mask: Mask | None) -> None:
        thread = _one_warp(unit, mask, statement)
        unit.block.products.finish()
        unit.block.tensor.deallocate(int(spread(where(unit), unit)[thread]), columns)

    return run


def _relinquish(statement: Statement, program: Program) -> Operation:
    def run(unit: Unit, mask: Mask | None) -> None:
        _one_warp(unit, mask, statement)
        unit.block.tensor.relinquish()

    return run


def _cells(
    unit: Unit, mask: Mask | None, at: Array, split: int, count: int, statement: Statement
) -> tuple[Array, Array]:
    """Lanes and columns that the active warps' registers hold, ``(warps, 32, 1 or count)``.

    9.7.16.2.3.1: a thread of .32x32b has a lane; of .16x32bx2, threads 16 on have the lanes of the
    others, ``split`` columns further on. 9.7.16.8.1: which lanes a warp may reach.
    """
    warps, thread = whole_warps(unit, mask, statement), np.arange(WARP)
    addresses = at.reshape(-1, WARP)[warps].astype(np.int64)
    if (addresses != addresses[:, :1]).any():
        raise RuntimeError(f"a warp's threads differ in the address at {statement.text}")
    each = 16 if split else WARP
    lanes = (addresses >> 16) + thread % each
    columns = (addresses & 0xFFFF) + thread // each * split
    if (lanes // WARP != ((unit.first // WARP + warps) % 4)[:, None]).any():
        raise RuntimeError(f"lanes of another warp at {statement.text}")
    return lanes[..., None], columns[..., None] + np.arange(count)


def _shape(statement: Statement, names: object) -> tuple[str, ...]:
    """The registers, after checking shape, count and kind."""
    assert isinstance(names, tuple)
    *_, shape, count, kind = statement.parts
    known = shape in ("32x32b", "16x32bx2") and kind == "b32" and count == f"x{len(names)}"
    if not known or len(statement.operands) != (3 if shape == "16x32bx2" else 2):
        raise NotImplementedError(statement.text)
    return names


def _load(statement: Statement, program: Program) -> Operation:
    names = _shape(statement, statement.operands[0])
    where = addresses(statement.operands[1], program)
    split = int(str(statement.operands[2])) if len(statement.operands) == 3 else 0

    def run(unit: Unit, mask: Mask | None) -> None:
        lanes, columns = _cells(unit, mask, where(unit), split, len(names), statement)
        active = active_threads(unit, mask)

        def land() -> None:
            values = np.zeros((unit.size, len(names)), np.uint32)
            values[active] = unit.block.tensor.load(lanes, columns).reshape(-1, len(names))
            for name, value in zip(names, np.ascontiguousarray(values.T), strict=True):
                unit.write(name, value, mask)

        unit.loads.add(frozenset(names), land, unit.late)

    return run


def _store(statement: Statement, program: Program) -> Operation:
    names = _shape(statement, statement.operands[-1])
    where = addresses(statement.operands[0], program)
    split = int(str(statement.operands[1])) if len(statement.operands) == 3 else 0
    sources = [reader(name, "b32", program) for name in names]

    def run(unit: Unit, mask: Mask | None) -> None:
        lanes, columns = _cells(unit, mask, where(unit), split, len(names), statement)
        values = np.stack([spread(read(unit), unit) for read in sources], 1)
        values = values[active_threads(unit, mask)].reshape(-1, WARP, len(names))
        unit.stores.add(partial(unit.block.tensor.store, lanes, columns, values), unit.late)

    return run


def _wait(statement: Statement, program: Program) -> Operation:
    loads = statement.parts[1] == "wait::ld"

    def run(unit: Unit, mask: Mask | None) -> None:
        if mask is not None:
            raise NotImplementedError(f"a part of the threads at {statement.text}")
        if loads:
            unit.loads.land()
        else:
            unit.stores.commit()
            unit.stores.wait(0)

    return run


@dataclass(frozen=True)
class Product:
    """What an instruction descriptor says (9.7.16.4.2, table 42): ``(m, n, 16)`` to float32."""

    m: int
    n: int
    kind_a: str
    kind_b: str
    transposed_a: bool
    transposed_b: bool

    @classmethod
    def of(cls, bits: int) -> Product:
        kinds = ("f16", "bf16")
        a, b, m, n = bits >> 7 & 7, bits >> 10 & 7, (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
        known = bits & 0x7F == 0x10 and a < 2 and b < 2
        if not known or bits >> 29 or bits >> 23 & 1 or bits >> 13 & 3:
            raise NotImplementedError(f"an instruction descriptor {bits:#x}")
        if m not in (64, 128) or not 8 <= n <= 256:
            raise RuntimeError(f"a product of {m} × {n} × {DEPTH}")
        return cls(m, n, kinds[a], kinds[b], bool(bits >> 15 & 1), bool(bits >> 16 & 1))

    def lanes(self, address: int) -> Array:
        """Of each row: layout D, or for 64 rows layout F, 16 to a warp (9.7.16.10.5)."""
        row, first = np.arange(self.m), address >> 16
        if first not in ((0,) if self.m == 128 else (0, 16)):
            raise RuntimeError(f"a matrix of {self.m} rows at lane {first}")
        return (first + (row if self.m == 128 else row // 16 * WARP + row % 16))[:, None]


_SPANS = {0: 16, 2: 128, 4: 64, 6: 32}  # bytes of a swizzled row for bits 61 to 63


def _shared_matrix(descriptor: int, transposed: bool) -> Matrix:
    """9.7.16.4.1, table 40."""
    fixed, mode = descriptor >> 46 & 7, descriptor >> 61 & 7
    if fixed != 1 or descriptor >> 52 & 0x1FF or mode not in _SPANS:
        raise NotImplementedError(f"a matrix descriptor {descriptor:#x}")
    return Matrix.of(descriptor, _SPANS[mode], transposed)


def _multiply(statement: Statement, program: Program) -> Operation:
    """9.7.16.10.9.1: D = A·B, or D += A·B; A in shared or in tensor memory."""
    if statement.parts[2:] != ["cta_group::1", "kind::f16"] or len(statement.operands) != 5:
        raise NotImplementedError(statement.text)
    d, a, b, descriptor, adds = statement.operands
    where_d, right = addresses(d, program), reader(b, "u64", program)
    held = isinstance(a, Address)
    left = addresses(a, program) if held else reader(a, "u64", program)
    described = reader(descriptor, "u32", program)

    def run(unit: Unit, mask: Mask | None) -> None:
        operands = [spread(read(unit), unit) for read in (where_d, left, right, described)]
        adding = np.broadcast_to(predicate(unit, adds), (unit.size,))
        for thread in active_threads(unit, mask):
            to, from_a, from_b, bits = (int(values[thread]) for values in operands)
            product, more = Product.of(bits), bool(adding[thread])
            if held and to >> 16 != from_a >> 16:
                raise RuntimeError(f"lanes of A and D differ at {statement.text}")
            work = partial(_product, unit, product, to, from_a, held, from_b, more)
            unit.block.products.add(unit.first + int(thread), work)

    return run


def _product(
    unit: Unit, product: Product, to: int, from_a: int, held: bool, from_b: int, adds: bool
) -> None:
    tensor, lanes = unit.block.tensor, product.lanes(to)
    if held:  # two neighbouring elements to a column
        columns = (from_a & 0xFFFF) + np.arange(DEPTH // 2)
        left = floats(tensor.load(lanes, columns), product.kind_a)
    else:
        matrix = _shared_matrix(from_a, product.transposed_a)
        left = matrix.read(unit.shared, product.m, product.kind_a)
    matrix = _shared_matrix(from_b, product.transposed_b)
    sums = left @ matrix.read(unit.shared, product.n, product.kind_b).T
    columns = (to & 0xFFFF) + np.arange(product.n)
    if adds:
        sums += tensor.load(lanes, columns).view(np.float32)
    tensor.store(lanes, columns, sums.view(np.uint32))


def _commit(statement: Statement, program: Program) -> Operation:
    """9.7.16.12.1: an arrival after all products this thread has asked for.

    Triton 3.6 leaves the state space out, and yet gives a place in shared memory, widened to 64
    bits: no generic address, but ptxas takes the lower half.
    """
    if not re.search(r"mbarrier::arrive::one(\.shared::cluster)?\.b64$", statement.opcode):
        raise NotImplementedError(statement.text)
    where = addresses(statement.operands[0], program)

    def run(unit: Unit, mask: Mask | None) -> None:
        for thread in active_threads(unit, mask):
            arrives_at = unit.block.barriers.at(int(where(unit)[thread]))
            unit.block.products.commit(unit.first + int(thread), arrives_at)

    return run


_TCGEN05: dict[str, Callable[[Statement, Program], Operation]] = {
    "alloc": _allocate,
    "dealloc": _deallocate,
    "relinquish_alloc_permit": _relinquish,
    "ld": _load,
    "st": _store,
    "wait::ld": _wait,
    "wait::st": _wait,
    "mma": _multiply,
    "commit": _commit,
}
