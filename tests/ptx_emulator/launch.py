"""Triton launches into the emulator: compiled for a GPU, specialised by the real launcher."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from instructions import operation
from machine import Kernel, Timing
from memory import GlobalMemory
from program import parse
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction
from values import DTYPES

# Few, so that small problems fill the device several times.
MULTIPROCESSORS = 4
# Bytes of shared memory a block may take (CUDA programming guide).
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}


class _StandInDriver:
    """Answers what the launcher asks before it launches."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


_reachable: list[Tensor] = []


@contextmanager
def reachable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Kernels launched inside find these by addresses that are in tensors they are given."""
    _reachable.extend(tensors)
    try:
        yield
    finally:
        _reachable.clear()


@contextmanager
def emulated(capability: int, timing: Timing, without: str = "") -> Iterator[list[str]]:
    """Kernels launched inside run on the CPU as compiled for ``capability`` (80, 89, 90 or 100).

    Yields the names of those launched, in order. One capability in a process. without: an opcode's
    beginning; such instructions are left out.
    """
    if capability >= 100 and not timing.apart:
        raise ValueError("on Blackwell the first warp goes ways of its own: it must be apart")
    driver.set_active(_StandInDriver(capability))
    for name, module in list(sys.modules.items()):
        if name.startswith("nybble.kernels.") and hasattr(module, "device_traits"):
            module.device_traits = lambda device: ("emulator", MULTIPROCESSORS, capability)
    launch: Callable[..., Any] = JITFunction.run
    kernels: dict[int, Kernel] = {}
    launched: list[str] = []

    def run(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, **{**options, "warmup": True})
        if compiled.metadata.shared > SHARED[capability]:
            raise OutOfResources(compiled.metadata.shared, SHARED[capability], "shared memory")
        binder = self.device_caches[0][4]
        bound = binder(*args, **{k: v for k, v in options.items() if k != "warmup"})[0]
        types = compiled.src.signature
        passed = [
            (kind, bound[name])
            for name, kind in types.items()
            if kind != "constexpr" and name in bound
        ]
        if id(compiled) not in kernels:
            kernels[id(compiled)] = Kernel(
                parse(compiled.asm["ptx"], without), operation, compiled.metadata.shared
            )
        kernel = kernels[id(compiled)]
        arguments = [_argument(kind, value) for kind, value in passed]
        # What instrumented kernels would write to; none of these is.
        scratch = len(kernel.program.parameters) - len(arguments)
        arguments += [np.zeros(1, np.uint64)] * scratch
        given = [value for _, value in passed if isinstance(value, Tensor)]
        memory = GlobalMemory([*given, *_reachable])
        sizes = (*grid, 1, 1)[:3]
        # Blocks come in another order at each launch.
        own = replace(timing, seed=timing.seed + len(launched))
        kernel.launch(sizes, arguments, memory, own)
        launched.append(self.__name__)
        return compiled

    JITFunction.run = run
    try:
        yield launched
    finally:
        JITFunction.run = launch


def _argument(kind: str, value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        return np.array([value.data_ptr()], np.uint64)
    dtype = {"i32": "s32", "i64": "s64", "fp32": "f32", "fp64": "f64", "i1": "u8"}[kind]
    return np.array([value], DTYPES[dtype])
