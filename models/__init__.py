"""What a decoder-only model is made of: one file a family, each an :class:`Architecture`.

Everything else (decoder, loaders, adapters, quantizers, fine-tuning, memory estimates) asks the
architecture and knows no family.
"""

from nybble.models.architecture import (
    Activation,
    Architecture,
    Attention,
    Fold,
    Layer,
    Linear,
    LinearGroup,
    Mlp,
    Norm,
    Rope,
    UnsupportedModelError,
)
from nybble.models.registry import architecture_of, supported_families

__all__ = [
    "Activation",
    "Architecture",
    "Attention",
    "Fold",
    "Layer",
    "Linear",
    "LinearGroup",
    "Mlp",
    "Norm",
    "Rope",
    "UnsupportedModelError",
    "architecture_of",
    "supported_families",
]
