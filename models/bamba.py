"""Bamba: state spaces (Mamba-2) in most layers, attention in the others."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp, mamba


def bamba(config: PretrainedConfig) -> Architecture:
    """Llama's layers under other names; half of a head is rotated."""
    mlp = gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        bias=bool(config.mlp_bias),
        norm="pre_ff_layernorm",
        module="feed_forward",
    )
    kinds = read.layer_types(config, "full_attention", "linear_attention")
    mixer = mamba(config) if "linear_attention" in kinds else None
    return decoder(
        config,
        mlp=mlp,
        mixers=tuple(mixer if kind == "linear_attention" else None for kind in kinds),
        layer_options={"pre_mlp": "pre_ff_layernorm"},
        final_norm="model.final_layernorm",
    )


FAMILIES = {"bamba": bamba}
