"""Small tensors to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers on ``device``, without waiting for what the device is doing."""
    made = torch.tensor(values, dtype=dtype)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)
