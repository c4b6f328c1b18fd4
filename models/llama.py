"""Llama 1 to 3, and what shares its config: Yi, InternLM 3 and DeepSeek-R1's distillations."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from nybble.models import config as read
from nybble.models.architecture import Architecture, Layer, Norm
from nybble.models.parts import attention, gated_mlp


def llama(config: PretrainedConfig) -> Architecture:
    """Grouped-query attention and a SwiGLU MLP, each behind an RMSNorm."""
    return decoder(config, bias=bool(getattr(config, "attention_bias", False)))


def decoder(
    config: PretrainedConfig,
    *,
    bias: bool = False,
    output_bias: bool | None = None,
    windows: tuple[int, ...] | None = None,
    **options: Any,
) -> Architecture:
    """Llama's layout with the differences that Mistral, Qwen2 and Qwen3 have.

    bias, output_bias: of q, k and v, and of o.
    windows: of each layer; None for layers that see all.
    options: further fields of :class:`Attention`.
    """
    hidden, layers = read.size(config, "hidden_size"), read.size(config, "num_hidden_layers")
    heads = read.head_sizes(config)
    rope = read.rope(config, heads[2])
    mlp = gated_mlp(
        hidden,
        read.size(config, "intermediate_size"),
        read.activation(config),
        bias=bool(getattr(config, "mlp_bias", False)),
    )
    return Architecture(
        family=config.model_type,
        vocab=read.size(config, "vocab_size"),
        hidden=hidden,
        layers=tuple(
            Layer(
                attention(
                    hidden,
                    *heads,
                    rope=rope,
                    window=window,
                    bias=bias,
                    output_bias=output_bias,
                    **options,
                ),
                mlp,
            )
            for window in (windows or (0,) * layers)
        ),
        norm=Norm(float(config.rms_norm_eps)),
        max_position_embeddings=read.size(config, "max_position_embeddings"),
        tied=bool(config.tie_word_embeddings),
    )


FAMILIES = {"llama": llama}
