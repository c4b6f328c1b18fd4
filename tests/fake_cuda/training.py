"""Fine-tuning and quantizing on the emulated GPU beside the CPU, in a process of its own.

Prints the losses and errors of both as JSON. The guard has to be loaded before PyTorch is, so this
is started by ``test_training.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from nybble.finetune import FinetuneSettings, LoRASettings, finetune
from nybble.quantizers import GptqSettings, quantize_checkpoint

from .device import CUDA, DEVICE
from .install import fake_cuda

CPU = torch.device("cpu")


def losses(base: Path, data: Path, out: Path, device: torch.device) -> list[float]:
    """Held-out losses before and after every step, the last two after a resume."""
    settings = FinetuneSettings(max_steps=2, accumulation=2, lora=LoRASettings(rank=4, alpha=8))
    options: dict[str, Any] = {"settings": settings, "device": device, "progress": False}
    result = finetune(base, data, out, **options)
    return [point.eval_loss for point in result.history]


def errors(source: Path, out: Path, device: torch.device) -> dict[str, list[float]]:
    """The relative output error of every layer, for each calibrated method."""
    calibration = torch.randint(3, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    methods: dict[str, dict[str, Any]] = {
        "gptq": {"format": "gptq", "settings": GptqSettings(desc_act=True)},
        "awq": {"format": "awq", "clip": True},
    }
    found = {}
    for name, options in methods.items():
        layers = quantize_checkpoint(
            source,
            out / name,
            group_size=32,
            calibration=calibration,
            device=device,
            progress=False,
            **options,
        )
        found[name] = [layer.relative for layer in layers]
    return found


def main() -> None:
    base, source, data, out = map(Path, sys.argv[1:])
    DEVICE.total = 1 << 30
    with fake_cuda():
        torch.cuda.set_device(CUDA)
        found = {
            str(device): {
                "losses": losses(base, data, out / f"{device.type} adapter", device),
                **errors(source, out / device.type, device),
            }
            for device in (CPU, CUDA)
        }
    json.dump(found, sys.stdout)
