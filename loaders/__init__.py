"""Checkpoint formats and model names in, packed weights out."""

from nybble.loaders.checkpoint import Checkpoint, open_checkpoint
from nybble.loaders.errors import CheckpointError
from nybble.loaders.packed_file import save_packed
from nybble.loaders.resolve import ModelNotFoundError, resolve_model

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ModelNotFoundError",
    "open_checkpoint",
    "resolve_model",
    "save_packed",
]
