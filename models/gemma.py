"""Gemma 1 and 2."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import config as read
from nybble.models.architecture import Architecture, Norm
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp

# Gemma 2 and 3 norm what attention and MLP read, and what they add.
NORMS = {
    "post_attention": "post_attention_layernorm",
    "pre_mlp": "pre_feedforward_layernorm",
    "post_mlp": "post_feedforward_layernorm",
}


def gemma(config: PretrainedConfig) -> Architecture:
    """Llama's layers with a GELU gate, scaled embeddings, and norms that add 1 to their weight."""
    hidden = read.size(config, "hidden_size")
    mlp = gated_mlp(hidden, read.size(config, "intermediate_size"), read.activation(config))
    return decoder(
        config,
        mlp=mlp,
        norm=Norm(float(config.rms_norm_eps), offset=1.0),
        embedding_multiplier=hidden**0.5,
    )


FAMILIES = {"gemma": gemma}
