"""Full-precision models in, 4-bit checkpoints in the public layouts out."""

from nybble.quantizers.checkpoint import quantize_checkpoint

__all__ = ["quantize_checkpoint"]
