"""Puts the emulated device in the place of ``torch.cuda``, for a while."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from . import launches, streams
from .device import DEVICE
from .guard import load_guard
from .tensor import fresh


@cache
def _tensors_may_be_on_a_gpu() -> tuple[ctypes.CDLL, torch.library.Library]:
    """For the rest of the process: a device guard, and who makes fresh tensors."""
    factories = torch.library.Library("aten", "IMPL")

    def empty(size: Any, **options: Any) -> Tensor:
        options.update(device=DEVICE.host_device, pin_memory=False)
        return fresh(torch.ops.aten.empty.memory_format(size, **options))

    def empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
        options.update(device=DEVICE.host_device, pin_memory=False)
        return fresh(torch.ops.aten.empty_strided.default(size, stride, **options))

    factories.impl("empty.memory_format", empty, "CUDA")
    factories.impl("empty_strided", empty_strided, "CUDA")
    return load_guard(), factories


def _pinning(make: Any) -> Any:
    """A factory that takes ``pin_memory`` without a driver."""

    def made(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        tensor: Tensor = make(*args, **options)
        return DEVICE.pin(tensor) if pin_memory else tensor

    return made


def _on_the_host_first(make: Any) -> Any:
    """``torch.tensor``, which makes tensors of the device past every hook."""

    def made(values: Any, *, device: Any = None, **options: Any) -> Tensor:
        tensor: Tensor = make(values, **options)
        return tensor if device is None else tensor.to(device)

    return made


@contextmanager
def fake_cuda() -> Iterator[None]:
    """``torch.cuda`` has two GPUs inside, of which the second may be used."""
    guard, _ = _tensors_may_be_on_a_gpu()

    def set_device(device: torch.device | int) -> None:
        guard.set_device(device if isinstance(device, int) else device.index or 0)

    properties = SimpleNamespace(
        name="Emulated GPU",
        multi_processor_count=launches.MULTIPROCESSORS,
        major=launches.CAPABILITY // 10,
        minor=launches.CAPABILITY % 10,
        total_memory=DEVICE.total,
    )
    stand_ins = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": guard.current_device,
        "set_device": set_device,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (DEVICE.total - DEVICE.allocated, DEVICE.total),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "max_memory_allocated": lambda device=None: DEVICE.peak,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: DEVICE.wait("torch.cuda.synchronize"),
        "current_stream": lambda device=None: streams.STREAM,
        "graph_pool_handle": object,
        "Stream": streams.Stream,
        "stream": streams.stream,
        "Event": streams.Event,
        "CUDAGraph": streams.CUDAGraph,
        "graph": streams.graph,
    }
    with pytest.MonkeyPatch.context() as patch, launches.patched_once():
        patch.setattr(
            torch.__future__, "_overwrite_module_params_on_conversion", True
        )  # a parameter cannot change from the one kind of tensor to the other
        patch.setattr(torch.version, "cuda", "13.0")
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch, "empty", _pinning(torch.empty))
        patch.setattr(torch, "zeros", _pinning(torch.zeros))
        patch.setattr(Tensor, "pin_memory", lambda tensor: DEVICE.pin(tensor.clone()))
        patch.setattr(InterpretedFunction, "run", launches.launcher(InterpretedFunction.run))
        patch.setattr(torch, "tensor", _on_the_host_first(torch.tensor))
        patch.setattr(driver, "_active", launches.StandInDriver())
        yield
