"""Runs the few PTX instructions the unpacking is written in, on arrays of 32-bit registers."""

import re

import numpy as np
import torch

Register = np.ndarray


def run(text: str, outputs: int, *operands: Register) -> list[Register]:
    """``$0``…``$(outputs−1)`` after running ``text`` with the operands in the registers after."""
    shape = operands[0].shape
    registers = {f"${outputs + i}": np.broadcast_to(v, shape) for i, v in enumerate(operands)}

    def value(name: str) -> Register:
        if name in registers:
            return registers[name]
        return np.full(shape, int(name, 0), dtype=np.uint32)

    for line in text.strip("{} \n").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            opcode, *names = re.split(r"[\s,]+", line.strip())
            registers[names[0]] = _execute(opcode, [value(name) for name in names[1:]])
    return [registers[f"${i}"] for i in range(outputs)]


def _execute(opcode: str, inputs: list[Register]) -> Register:
    a, b, *rest = [*inputs, np.uint32(0)]
    match opcode:
        case "mov.b32":
            return a
        case "shr.u32":
            return a >> b
        case "shl.b32":
            return a << b
        case "and.b32":
            return a & b
        case "lop3.b32":
            return _lop3(a, b, rest[0], int(rest[1].flat[0]))
        case "prmt.b32":
            return _prmt(a, b, rest[0])
        case "sub.rn.f16x2":
            return _bits(_halves(a, torch.float16) - _halves(b, torch.float16))
        case "fma.rn.bf16x2":
            x, y, z = (_halves(v, torch.bfloat16).double() for v in (a, b, rest[0]))
            return _bits((x * y + z).bfloat16())
    raise NotImplementedError(opcode)


def _lop3(a: Register, b: Register, c: Register, table: int) -> Register:
    """The bit of ``table`` numbered by the three input bits, a's the highest (PTX ISA, lop3)."""
    out = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            terms = (v if index >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0)))
            out |= np.bitwise_and.reduce(list(terms))
    return out


def _prmt(a: Register, b: Register, selector: Register) -> Register:
    """Four bytes of the eight in b:a; a selector's top bit spreads the byte's sign (PTX ISA)."""
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for place in range(4):
        nibble = selector >> np.uint32(4 * place) & np.uint32(15)
        byte = (pool >> (8 * (nibble & 7)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        out |= byte << np.uint32(8 * place)
    return out


def _halves(register: Register, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(register).view(np.int16)).view(dtype)


def _bits(values: torch.Tensor) -> Register:
    return values.contiguous().view(torch.int16).numpy().view(np.uint32)
