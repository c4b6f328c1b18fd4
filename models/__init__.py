"""What a decoder-only model is made of: one file a family, each an :class:`Architecture`.

Everything else (decoder, loaders, adapters, quantizers, fine-tuning, memory estimates) asks the
architecture and knows no family.
"""

from nybble.models.architecture import (
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
    StateTensor,
    UnsupportedModelError,
    Xielu,
)
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
    "StateTensor",
    "UnsupportedModelError",
    "Xielu",
    "architecture_of",
    "require_family",
    "supported_families",
]
