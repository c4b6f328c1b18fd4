"""Apertus: Llama's layers, norms of heads, an MLP without a gate whose activation learns."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from nybble.models import Architecture, Xielu
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import plain_mlp


def apertus(config: PretrainedConfig) -> Architecture:
    """``down_proj(xielu(up_proj))``; its norms have names of their own."""
    learned = config.hidden_act == "xielu"
    mlp = plain_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        "silu" if learned else read.activation(config),
        norm="feedforward_layernorm",
    )
    return decoder(
        config,
        mlp=replace(mlp, xielu=Xielu("mlp.act_fn")) if learned else mlp,
        attention_options={"norm": "attention_layernorm", "qk_norm": "head"},
        layer_options={
            "pre_attention": "attention_layernorm",
            "pre_mlp": "feedforward_layernorm",
        },
    )


FAMILIES = {"apertus": apertus}
