"""What a decoder-only model is made of: one file a family, each an :class:`Architecture`.

Everything else (decoder, loaders, adapters, quantizers, fine-tuning, memory estimates) asks the
architecture and knows no family.
"""

from nybble.models.anatomy.architecture import Architecture, Layer, Mixer
from nybble.models.anatomy.attention import AnyAttention, Attention, LatentAttention
from nybble.models.anatomy.feed_forward import ClampedSwiglu, Mixture, Mlp, Router, Stacked, Xielu
from nybble.models.anatomy.linears import Fold, Linear, LinearGroup, Norm, Rope
from nybble.models.anatomy.mtp import Mtp
from nybble.models.anatomy.recurrent import (
    GatedDeltaNet,
    Recurrent,
    ShortConvolution,
    StateSpace,
    StateTensor,
)
from nybble.models.config import UnsupportedModelError
from nybble.models.registry import architecture_of, require_family, supported_families

__all__ = [
    "AnyAttention",
    "Architecture",
    "Attention",
    "ClampedSwiglu",
    "Fold",
    "GatedDeltaNet",
    "LatentAttention",
    "Layer",
    "Linear",
    "LinearGroup",
    "Mixer",
    "Mixture",
    "Mlp",
    "Mtp",
    "Norm",
    "Recurrent",
    "Rope",
    "Router",
    "ShortConvolution",
    "Stacked",
    "StateSpace",
    "StateTensor",
    "UnsupportedModelError",
    "Xielu",
    "architecture_of",
    "require_family",
    "supported_families",
]
