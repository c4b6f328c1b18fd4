"""Full-precision models in, 4-bit checkpoints in the public layouts out."""

from nybble.quantizers.checkpoint import LayerError, quantize_checkpoint
from nybble.quantizers.gptq import GptqSettings

__all__ = ["GptqSettings", "LayerError", "quantize_checkpoint"]
