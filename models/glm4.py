"""GLM-4: fused gate and up, norms before and after, half of each head rotated in pairs."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import fused_gated_mlp


def glm(config: PretrainedConfig, **layer_options: str) -> Architecture:
    """GLM-4-9B as first published; ``layer_options`` are further fields of a layer."""
    layers, head_dim = read.size(config, "num_hidden_layers"), read.head_sizes(config)[2]
    return decoder(
        config,
        ropes=(read.rope(config, head_dim, interleaved=True),) * layers,
        mlp=fused_gated_mlp(
            read.size(config, "hidden_size"),
            read.size(config, "intermediate_size"),
            read.activation(config),
        ),
        attention_options={"output_bias": False},
        layer_options=layer_options,
    )


def glm4(config: PretrainedConfig) -> Architecture:
    """GLM-4-0414: what attention and MLP add is normed as well."""
    return glm(config, post_attention="post_self_attn_layernorm", post_mlp="post_mlp_layernorm")


FAMILIES = {"glm": glm, "glm4": glm4}
