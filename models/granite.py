"""Granite 3 and the dense Granite 4: Llama's layers with four multipliers."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models.architecture import Architecture
from nybble.models.llama import decoder


def granite(config: PretrainedConfig) -> Architecture:
    """Of embeddings, attention scores, what a layer adds, and (a divisor) of logits."""
    return decoder(
        config,
        attention_options={"scale": float(config.attention_multiplier)},
        embedding_multiplier=float(config.embedding_multiplier),
        residual_multiplier=float(config.residual_multiplier),
        logits_multiplier=1 / float(config.logits_scaling),
    )


FAMILIES = {"granite": granite}
