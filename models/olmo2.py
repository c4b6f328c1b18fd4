"""OLMo 2 and OLMo 3: norms after attention and MLP, none before; norms of all queries and keys."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Norm, Rope
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp

_NORMS = {
    "pre_attention": None,
    "post_attention": "post_attention_layernorm",
    "pre_mlp": None,
    "post_mlp": "post_feedforward_layernorm",
}


def olmo2(
    config: PretrainedConfig,
    windows: tuple[int, ...] | None = None,
    ropes: tuple[Rope, ...] | None = None,
) -> Architecture:
    """Attention and MLP read the residual stream as it is."""
    mlp = gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        norm=None,
    )
    return decoder(
        config,
        windows=windows,
        ropes=ropes,
        mlp=mlp,
        attention_options={"norm": None, "qk_norm": "all"},
        layer_options=_NORMS,
        norm=Norm(float(config.rms_norm_eps), offset=0.0),  # rounded once
    )


def olmo3(config: PretrainedConfig) -> Architecture:
    """Most layers have a window; these have a rotary embedding of their own."""
    head_dim = read.head_sizes(config)[2]
    ropes = {
        kind: read.rope(config, head_dim, layer_type=kind)
        for kind in dict.fromkeys(config.layer_types)
    }
    return olmo2(config, read.windows(config), tuple(ropes[kind] for kind in config.layer_types))


FAMILIES = {"olmo2": olmo2, "olmo3": olmo3}
