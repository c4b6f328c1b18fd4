"""Command R (Cohere 1) and Command R7B and A (Cohere 2): attention and MLP side by side."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from nybble.models import Architecture, Norm, Rope
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp


def _side_by_side(
    config: PretrainedConfig,
    windows: tuple[int, ...] | None,
    ropes: tuple[Rope | None, ...],
    **attention_options: Any,
) -> Architecture:
    mlp = gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        norm=None,  # attention and MLP share one norm: neither's scales can be folded into it
    )
    return decoder(
        config,
        windows=windows,
        ropes=ropes,
        mlp=mlp,
        attention_options={"norm": None, **attention_options},
        layer_options={"pre_mlp": None, "parallel": True},
        norm=Norm(float(config.layer_norm_eps), kind="layer"),
        logits_multiplier=float(config.logit_scale),
    )


def cohere(config: PretrainedConfig) -> Architecture:
    """One LayerNorm without bias a layer, pairs rotated, in the larger models norms of heads."""
    rope = read.rope(config, read.head_sizes(config)[2], interleaved=True)
    ropes = (rope,) * read.size(config, "num_hidden_layers")
    if config.use_qk_norm:
        return _side_by_side(config, None, ropes, qk_norm="each")
    return _side_by_side(config, None, ropes)


def cohere2(config: PretrainedConfig) -> Architecture:
    """Layers that see all rotate nothing; the others have a window."""
    rope = read.rope(config, read.head_sizes(config)[2], interleaved=True)
    windows = read.windows(config)
    return _side_by_side(config, windows, tuple(rope if w else None for w in windows))


FAMILIES = {"cohere": cohere, "cohere2": cohere2}
