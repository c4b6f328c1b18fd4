"""Triton launches on the emulated device.

The real launcher's binder specialises the arguments, so that every variant that a GPU would have to
compile is known; the interpreter computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, compute_cache_key

from .device import CUDA, DEVICE
from .tensor import DeviceTensor

CAPABILITY = 90
# Few, so that small problems fill the device several times.
MULTIPROCESSORS = 4


class StandInDriver:
    """Answers what the launcher asks before it launches."""

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


@lru_cache
def _compiled(kernel: InterpretedFunction[Any]) -> JITFunction[Any]:
    return JITFunction(kernel.fn, **kernel.kwargs)


def variant(kernel: InterpretedFunction[Any], *args: Any, **options: Any) -> str:
    """What decides, with the kernel itself, whether its machine code is there already."""
    _, keys, _, _, bind = _compiled(kernel).device_caches[torch.cuda.current_device()]
    _, specialization, settings = bind(*args, **options)
    return compute_cache_key(keys, specialization, settings)


@contextmanager
def patched_once() -> Iterator[None]:
    """The interpreter's stand-ins for Triton's functions, set up once and not at every call."""
    patch = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = patch(everything)
    with pytest.MonkeyPatch.context() as kept:
        kept.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=int))
        yield
    scope.restore()


def launcher(
    interpret: Callable[..., Any],
) -> Callable[..., None]:
    """In place of ``InterpretedFunction.run``, which is ``interpret``."""

    def run(self: InterpretedFunction[Any], *args: Any, grid: Any, **options: Any) -> None:
        options.pop("warmup", None)
        tensors = [a for a in [*args, *options.values()] if isinstance(a, Tensor)]
        mine = [each for each in tensors if isinstance(each, DeviceTensor)]
        if not mine:
            interpret(self, *args, grid=grid, warmup=False, **options)
            return
        if len(mine) < len(tensors):
            raise ValueError(f"{self.__name__}: a pointer is of the host's memory")
        if torch.cuda.current_device() != CUDA.index:
            raise RuntimeError(
                f"{self.__name__} is launched on cuda:{torch.cuda.current_device()}, "
                f"but its tensors are on {CUDA}"
            )
        host = [a.host if isinstance(a, DeviceTensor) else a for a in args]
        named = {k: a.host if isinstance(a, DeviceTensor) else a for k, a in options.items()}
        work = partial(interpret, self, *host, grid=grid, warmup=False, **named)
        DEVICE.launch(
            self.__name__, variant(self, *host, **named), work, [each.memory for each in mine]
        )

    return run
