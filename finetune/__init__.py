"""Adapters trained on a packed 4-bit base."""

from nybble.finetune.lora import LoRASettings
from nybble.finetune.rows import DataError
from nybble.finetune.train import (
    FinetuneResult,
    FinetuneSettings,
    Progress,
    finetune,
    plot_losses,
)

__all__ = [
    "DataError",
    "FinetuneResult",
    "FinetuneSettings",
    "LoRASettings",
    "Progress",
    "finetune",
    "plot_losses",
]
