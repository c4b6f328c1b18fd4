"""What a decoder-only model is made of: one file a family, each an :class:`Architecture`.

Everything else (decoder, loaders, adapters, quantizers, fine-tuning, memory estimates) asks the
architecture and knows no family.
"""

from nybble.models.anatomy import (
    AnyAttention,
    Architecture,
    Attention,
    ClampedSwiglu,
    Fold,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    Linear,
    LinearGroup,
    Mixture,
    Mlp,
    Norm,
    Recurrent,
    Rope,
    Router,
    ShortConvolution,
    Stacked,
    StateSpace,
    StateTensor,
    Xielu,
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
    "Mixture",
    "Mlp",
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
