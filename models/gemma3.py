"""Gemma 3's text models."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Norm
from nybble.models import config as read
from nybble.models.gemma import NORMS
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp


def gemma3(config: PretrainedConfig) -> Architecture:
    """Norms before and after attention and MLP, windows in most layers, two rotary bases."""
    read.refuse(config, use_bidirectional_attention=False)
    hidden = read.size(config, "hidden_size")
    head_dim = read.head_sizes(config)[2]
    ropes = {
        kind: read.rope(config, head_dim, layer_type=kind, includes_scaling=True)
        for kind in dict.fromkeys(config.layer_types)
    }
    mlp = gated_mlp(
        hidden,
        read.size(config, "intermediate_size"),
        read.activation(config, "hidden_activation"),
        norm="pre_feedforward_layernorm",
    )
    return decoder(
        config,
        windows=read.windows(config),
        ropes=[ropes[kind] for kind in config.layer_types],
        mlp=mlp,
        attention_options={
            "scale": read.number("query_pre_attn_scalar", config.query_pre_attn_scalar, above=0.0)
            ** -0.5,
            "qk_norm": "head",
        },
        layer_options=NORMS,
        norm=Norm(float(config.rms_norm_eps), offset=1.0),
        embedding_multiplier=hidden**0.5,
        logits_softcap=config.final_logit_softcapping,
    )


FAMILIES = {"gemma3_text": gemma3}
