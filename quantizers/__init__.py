"""Full-precision models in, 4-bit checkpoints in the public layouts out."""

from nybble.quantizers.checkpoint import LayerError, quantize_checkpoint
from nybble.quantizers.divergence import merge_divergence, rounding_divergence
from nybble.quantizers.gptq import GptqSettings
from nybble.quantizers.in_flight import InFlight
from nybble.quantizers.merge import MergedLayer, merge_adapter

__all__ = [
    "GptqSettings",
    "InFlight",
    "LayerError",
    "MergedLayer",
    "merge_adapter",
    "merge_divergence",
    "quantize_checkpoint",
    "rounding_divergence",
]
