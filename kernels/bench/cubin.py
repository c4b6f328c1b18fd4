"""Compiles a Triton kernel for a GPU that need not be present, and reads the machine code.

Its tools (ptxas, cuobjdump) come with the Triton wheel. ``TRITON_INTERPRET`` must not be set when
the kernel is defined, because the interpreter replaces ``triton.jit``.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)(.*?);")
_TARGET = re.compile(r"0x([0-9a-f]+)(?:\s|$)")  # some disassemblers write waits behind it
# What ptxas says when it makes asynchronous products wait for one another.
_SERIALIZED = re.compile(r".*\(C75\d\d\).*")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)")
# Processes that compile at once; each takes some 600 MB.
COMPILERS = min(4, os.cpu_count() or 1)
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "QGMMA")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its byte address, opcode with modifiers, and operands."""

    address: int
    opcode: str
    operands: str


@dataclass(frozen=True)
class Report:
    """What the assembler made of one kernel.

    registers: per thread.
    shared: bytes a block takes.
    local: bytes of stack and local memory a thread takes, 0 if nothing was spilled.
    warnings: of ptxas, that it makes Hopper's products wait for one another.
    """

    registers: int
    shared: int
    local: int
    ptx: str
    cubin: bytes = field(repr=False)
    warnings: tuple[str, ...]

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """Read when they are asked for: the disassembler takes most of a second to start."""
        return tuple(
            Instruction(int(address, 16), opcode, operands.strip())
            for address, opcode, operands in _INSTRUCTION.findall(_dump("-sass", self.cubin))
        )

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode begins with one of ``prefixes``."""
        return sum(i.opcode.startswith(prefixes) for i in self.instructions)

    def loops(self) -> list[tuple[Instruction, ...]]:
        """The body of every backward branch, shortest first (inner loops before outer ones).

        Two kinds of backward branch are no loops and are left out: the branch to itself that pads
        the end of a kernel, and a branch from code after the kernel's exit back into it. Blackwell
        puts its waits for barriers there; the instructions in between do not run again.
        """
        found = []
        for branch in self.instructions:
            target = _TARGET.search(branch.operands) if branch.opcode.startswith("BRA") else None
            if target and (start := int(target.group(1), 16)) < branch.address:
                body = [i for i in self.instructions if start <= i.address <= branch.address]
                if not any(i.opcode == "EXIT" for i in body):
                    found.append(tuple(body))
        return sorted(found, key=len)

    def tensor_core_loop(self) -> tuple[Instruction, ...]:
        """The innermost loop that multiplies on the tensor cores, empty if there is none."""
        for body in self.loops():
            if any(i.opcode.startswith(TENSOR_CORE) for i in body):
                return body
        return ()


def opcodes(body: Sequence[Instruction]) -> Counter[str]:
    """How often each opcode occurs, its modifiers ignored."""
    return Counter(i.opcode.split(".")[0] for i in body)


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
    aligned: Sequence[str] = (),
) -> Report:
    """Compile ``kernel`` for compute capability ``capability`` (80, 89, 90, 100) and read the code.

    types: Triton's type of each run-time argument (``"*fp16"``, ``"i32"``).
    constants: the value of each ``constexpr``.
    max_registers: how many a thread may take; None leaves it to the compiler.
    aligned: numbers to be treated as multiples of 16. Every pointer is, as the launcher finds for
        memory from the allocator.

    Raises ValueError if an argument has neither a type nor a value, and RuntimeError if Triton
    compiled the kernel to a trap.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    missing = [n for n in signature if n not in types and n not in constants]
    if missing:
        raise ValueError(f"{kernel.__name__}: no type or value for {', '.join(missing)}")
    known = [n for n, t in types.items() if t.startswith("*") or n in aligned]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in known}
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            ASTSource(kernel, signature, dict(constants), attrs),
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": num_warps,
                "num_stages": num_stages,
                "maxnreg": max_registers,
                "enable_fp_fusion": True,
            },
        )
    if "\ttrap;" in compiled.asm["ptx"]:
        raise RuntimeError(
            f"{kernel.__name__} with {dict(constants)} for sm_{capability}: Triton "
            f"{triton.__version__} compiled it to a trap"
        )
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    resources = _dump("-res-usage", cubin)
    registers, stack, local = (int(x) for x in _RESOURCES.findall(resources)[0])
    # Triton says nothing if it knows the result already.
    log = said.getvalue() or (_assembled(ptx, capability) if "wgmma" in ptx else "")
    warnings = tuple(_SERIALIZED.findall(log))
    return Report(registers, compiled.metadata.shared, stack + local, ptx, cubin, warnings)


def _assembled(ptx: str, capability: int) -> str:
    """What ptxas says of it."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", file.name]
        done = subprocess.run(
            [*command, "-o", os.devnull], check=True, capture_output=True, text=True
        )
    return done.stdout + done.stderr


def _dump(option: str, cubin: bytes) -> str:
    """What the disassembler says of it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(tool), option, file.name], check=True, capture_output=True, text=True
        ).stdout
