"""Checkpoint formats and model names in, packed weights out."""

from nybble.loaders.adapter import LoRAAdapter, load_adapter, resolve_adapter
from nybble.loaders.adapter_combine import combine_adapters
from nybble.loaders.checkpoint import Checkpoint, open_checkpoint
from nybble.loaders.errors import AdapterError, CheckpointError
from nybble.loaders.packed_file import save_packed
from nybble.loaders.resolve import resolve_model
from nybble.model_name import ModelNotFoundError

__all__ = [
    "AdapterError",
    "Checkpoint",
    "CheckpointError",
    "LoRAAdapter",
    "ModelNotFoundError",
    "combine_adapters",
    "load_adapter",
    "open_checkpoint",
    "resolve_adapter",
    "resolve_model",
    "save_packed",
]
