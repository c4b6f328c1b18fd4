"""Gemma 1 and 2."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Norm
from nybble.models import config as read
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


def gemma2(config: PretrainedConfig) -> Architecture:
    """Norms after attention and MLP too, soft caps, windows in every other layer."""
    read.refuse(config, use_bidirectional_attention=False)
    hidden = read.size(config, "hidden_size")
    mlp = gated_mlp(
        hidden,
        read.size(config, "intermediate_size"),
        read.activation(config, "hidden_activation"),
        norm="pre_feedforward_layernorm",
    )
    return decoder(
        config,
        windows=read.windows(config),
        mlp=mlp,
        attention_options={
            "scale": read.number("query_pre_attn_scalar", config.query_pre_attn_scalar, above=0.0)
            ** -0.5,
            "softcap": config.attn_logit_softcapping,
        },
        layer_options=NORMS,
        norm=Norm(float(config.rms_norm_eps), offset=1.0),
        embedding_multiplier=hidden**0.5,
        logits_softcap=config.final_logit_softcapping,
    )


FAMILIES = {"gemma": gemma, "gemma2": gemma2}
