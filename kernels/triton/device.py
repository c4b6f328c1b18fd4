"""What the kernels' settings depend on of a device."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def device_traits(device: torch.device) -> tuple[str, int, int]:
    """Name, multiprocessors and compute capability (90 for 9.0); an H100's for the interpreter."""
    if device.type != "cuda":
        return "interpreter", 132, 90
    properties = torch.cuda.get_device_properties(device)
    return (
        properties.name,
        properties.multi_processor_count,
        10 * properties.major + properties.minor,
    )
