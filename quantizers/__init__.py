"""Full-precision models in, 4-bit checkpoints in the public layouts out."""

from nybble.quantizers.checkpoint import quantize_checkpoint
from nybble.quantizers.in_flight import InFlight

__all__ = ["InFlight", "quantize_checkpoint"]
