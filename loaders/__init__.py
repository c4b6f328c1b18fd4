"""Checkpoint formats and model names in, packed weights out."""

from nybble.loaders.checkpoint import Checkpoint, open_checkpoint
from nybble.loaders.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]
