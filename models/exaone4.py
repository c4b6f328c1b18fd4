"""EXAONE 4: norms after attention and MLP, norms of query and key heads."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp


def exaone4(config: PretrainedConfig) -> Architecture:
    """If layers have windows, those that see all rotate nothing."""
    rope = read.rope(config, read.head_sizes(config)[2])
    layers = read.size(config, "num_hidden_layers")
    windows = (0,) * layers if config.sliding_window is None else read.windows(config)
    mlp = gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        norm=None,
    )
    return decoder(
        config,
        windows=windows,
        ropes=tuple(None if any(windows) and not window else rope for window in windows),
        mlp=mlp,
        attention_options={"bias": False, "norm": None, "qk_norm": "head"},
        layer_options={
            "pre_attention": None,
            "post_attention": "post_attention_layernorm",
            "pre_mlp": None,
            "post_mlp": "post_feedforward_layernorm",
        },
    )


FAMILIES = {"exaone4": exaone4}
