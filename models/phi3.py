"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import fused_attention, fused_gated_mlp


def phi3(config: PretrainedConfig) -> Architecture:
    """Llama's layers whose checkpoints hold q, k, v as one matrix, and gate, up as another."""
    hidden = read.size(config, "hidden_size")
    mlp = fused_gated_mlp(hidden, read.size(config, "intermediate_size"), read.activation(config))
    separate = decoder(config, windows=read.windows(config), mlp=mlp)
    return replace(
        separate,
        layers=tuple(
            replace(layer, mixers=(fused_attention(hidden, attention),))
            for layer, attention in zip(separate.layers, separate.plain_attentions, strict=True)
        ),
    )


FAMILIES = {"phi3": phi3}
