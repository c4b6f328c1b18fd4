"""Llama 1 to 3, and what shares its config: Yi, InternLM 3, Falcon 3, DeepSeek-R1's distillations.

:func:`decoder` is the layout that most families vary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from nybble.models import (
    Architecture,
    LatentAttention,
    Layer,
    Mixture,
    Mlp,
    Norm,
    Recurrent,
    Rope,
)
from nybble.models import config as read
from nybble.models.parts import attention, gated_mlp


def decoder(
    config: PretrainedConfig,
    *,
    windows: Sequence[int] | None = None,
    ropes: Sequence[Rope | None] | None = None,
    mlp: Mlp | None = None,
    mlps: Sequence[Mlp | Mixture] | None = None,
    mixers: Sequence[LatentAttention | Recurrent | None] | None = None,
    attention_options: Mapping[str, Any] | None = None,
    layer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Architecture:
    """Llama's layout, and what a family has instead of its parts.

    windows: of each layer; None for layers that see all.
    ropes: of each layer, None within it for a layer without positions; None for one of all layers.
    mlp: of all layers; a gated MLP behind ``post_attention_layernorm`` if None.
    mlps: of each layer, instead of ``mlp``.
    mixers: of each layer, what it has instead of Llama's attention, None within it for that; None
        if all have it.
    attention_options: further arguments of :func:`nybble.models.parts.attention`.
    layer_options: further fields of :class:`Layer`.
    options: further fields of :class:`Architecture`.
    """
    hidden, layers = read.size(config, "hidden_size"), read.size(config, "num_hidden_layers")
    heads = read.head_sizes(config)
    if mlps is None:
        mlp = mlp or gated_mlp(
            hidden,
            read.size(config, "intermediate_size"),
            read.activation(config),
            bias=bool(getattr(config, "mlp_bias", False)),
        )
        mlps = (mlp,) * layers
    windows = windows or (0,) * layers
    ropes = ropes or (read.rope(config, heads[2]),) * layers
    about = dict(attention_options or {})
    about.setdefault("bias", bool(getattr(config, "attention_bias", False)))
    mixers = mixers or (None,) * layers
    options.setdefault("norm", Norm(float(getattr(config, "rms_norm_eps", 0))))
    return Architecture(
        family=config.model_type,
        vocab=read.size(config, "vocab_size"),
        hidden=hidden,
        layers=tuple(
            Layer(
                (mixer or attention(hidden, *heads, rope=rope, window=window, **about),),
                mlp,
                **(layer_options or {}),
            )
            for window, rope, mlp, mixer in zip(windows, ropes, mlps, mixers, strict=True)
        ),
        max_position_embeddings=read.size(config, "max_position_embeddings"),
        tied=bool(config.tie_word_embeddings),
        **options,
    )


FAMILIES = {"llama": decoder}
