"""StarCoder2: LayerNorms, biases everywhere, a GELU MLP without a gate."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Norm
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import plain_mlp


def starcoder2(config: PretrainedConfig) -> Architecture:
    """All layers have one window, or none."""
    read.refuse(config, norm_type="layer_norm", mlp_type="default")
    bias = bool(config.use_bias)
    mlp = plain_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        bias=bias,
        up="c_fc",
        down="c_proj",
    )
    return decoder(
        config,
        windows=read.windows(config),
        mlp=mlp,
        attention_options={"bias": bias},
        norm=Norm(float(config.norm_epsilon), kind="layer", bias=True),
    )


FAMILIES = {"starcoder2": starcoder2}
