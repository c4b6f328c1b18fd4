"""ERNIE 4.5's dense models: Llama's layers with pairs rotated."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import config as read
from nybble.models.architecture import Architecture
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp


def ernie4_5(config: PretrainedConfig) -> Architecture:
    """``use_bias`` is for every linear layer."""
    bias = bool(config.use_bias)
    rope = read.rope(config, read.head_sizes(config)[2], interleaved=True)
    mlp = gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        bias=bias,
    )
    return decoder(
        config,
        ropes=(rope,) * read.size(config, "num_hidden_layers"),
        mlp=mlp,
        attention_options={"bias": bias},
    )


FAMILIES = {"ernie4_5": ernie4_5}
