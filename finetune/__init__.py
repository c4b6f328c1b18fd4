"""Adapters trained on a packed 4-bit base."""

from nybble.finetune.data import DataError
from nybble.finetune.lora import LoraSettings
from nybble.finetune.train import FinetuneResult, FinetuneSettings, finetune, plot_losses

__all__ = [
    "DataError",
    "FinetuneResult",
    "FinetuneSettings",
    "LoraSettings",
    "finetune",
    "plot_losses",
]
