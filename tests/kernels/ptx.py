"""Runs the PTX that the unpacking is written in, on arrays of 32-bit registers."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "ptx_emulator"))
from instructions import operation
from machine import Unit
from program import program

Register = np.ndarray


def run(text: str, outputs: int, *operands: Register) -> list[Register]:
    """``$0``…``$(outputs−1)`` after running ``text`` with the operands in the registers after."""
    shape = operands[0].shape
    names = [f"${i}" for i in range(outputs + len(operands))]
    parsed = program(text.strip("{} \n"))
    parsed = replace(parsed, widths=parsed.widths | dict.fromkeys(names, 4))
    block = SimpleNamespace(memory=None, shared=None, late=False)  # no memory is reached
    unit = Unit(0, int(np.prod(shape)), parsed, {}, {}, block)
    for name, values in zip(names[outputs:], operands, strict=True):
        unit.registers[name] = np.ascontiguousarray(np.broadcast_to(values, shape)).reshape(-1)
    for statement in parsed.statements:
        operation(statement, parsed)(unit, None)
    return [unit.registers[name].reshape(shape) for name in names[:outputs]]
