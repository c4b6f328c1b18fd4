"""The device properties that the kernels' settings depend on."""

from __future__ import annotations

import re
from functools import lru_cache

import torch
import triton

# A launch asks for fused multiply-adds, because Triton 3.10 and later make none by default.
FUSED = {"enable_fp_fusion": True}
# Earlier versions leave out the fence between copies to shared memory and Blackwell's tensor cores,
# which may then read old data (triton-lang/triton#9610).
_FENCES_COPIES = (3, 7, 1)


@lru_cache
def device_traits(device: torch.device) -> tuple[str, int, int]:
    """Name, multiprocessors and compute capability (90 for 9.0); an H100's for the interpreter.

    Raises ValueError if this Triton compiles wrong products for the device.
    """
    if device.type != "cuda":
        return "interpreter", 132, 90
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    check_compiler(properties.name, capability)
    return properties.name, properties.multi_processor_count, capability


def through_registers(capability: int) -> bool:
    """Whether a product's operands pass through registers, as on tensor cores of Ampere's kind."""
    return capability < 90 or capability >= 120


def check_compiler(name: str, capability: int) -> None:
    """Raises ValueError if this Triton compiles wrong products for the device ``name``."""
    version = triton.__version__
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if 100 <= capability < 120 and release < _FENCES_COPIES:
        needed = ".".join(map(str, _FENCES_COPIES))
        raise ValueError(
            f"Triton {version} compiles products for {name} that may read stale memory: "
            f"install Triton {needed} or newer"
        )
