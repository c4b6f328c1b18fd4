"""HunYuan dense: Llama's layers with norms of query and key heads after they are rotated."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder


def hunyuan_dense(config: PretrainedConfig) -> Architecture:
    """``dynamic`` scaling with a fixed ``alpha`` is a larger base, whatever the length."""
    head_dim = read.head_sizes(config)[2]
    rope = read.rope(config, head_dim)
    alpha = rope.parameters.get("alpha")
    if rope.parameters["rope_type"] == "dynamic" and alpha:
        base = rope.parameters["rope_theta"] * alpha ** (head_dim / (head_dim - 2))
        rope = replace(rope, parameters={"rope_type": "default", "rope_theta": base})
    return decoder(
        config,
        ropes=(rope,) * read.size(config, "num_hidden_layers"),
        attention_options={
            "qk_norm": "head",
            "q_norm": "self_attn.query_layernorm",
            "k_norm": "self_attn.key_layernorm",
            "rotate_first": True,
        },
    )


FAMILIES = {"hunyuan_v1_dense": hunyuan_dense}
