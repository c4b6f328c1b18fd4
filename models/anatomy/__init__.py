"""What models are made of, as data: the words in which a family's file describes itself."""

from nybble.models.anatomy.architecture import Architecture, Layer
from nybble.models.anatomy.attention import AnyAttention, Attention, LatentAttention
from nybble.models.anatomy.feed_forward import ClampedSwiglu, Mixture, Mlp, Router, Stacked, Xielu
from nybble.models.anatomy.linears import Fold, Linear, LinearGroup, Norm, Rope
from nybble.models.anatomy.recurrent import (
    GatedDeltaNet,
    Recurrent,
    ShortConvolution,
    StateSpace,
    StateTensor,
)

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
    "Xielu",
]
