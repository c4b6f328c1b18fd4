"""Adapters trained on a packed 4-bit base."""

from nybble.finetune.lora import LoraSettings
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
    "LoraSettings",
    "Progress",
    "finetune",
    "plot_losses",
]
