"""Granite 3 and the dense Granite 4: Llama's layers with four multipliers; Granite 3's mixtures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from nybble.models import config as read
from nybble.models.architecture import (
    Architecture,
    Mixture,
    Mlp,
    Router,
    Stacked,
    UnsupportedModelError,
)
from nybble.models.llama import decoder
from nybble.models.parts import fused_gated_mlp, mixture


def granite(
    config: PretrainedConfig, mlps: tuple[Mlp | Mixture, ...] | None = None, **options: Any
) -> Architecture:
    """Of embeddings, attention scores, what a layer adds, and (a divisor) of logits."""
    return decoder(
        config,
        mlps=mlps,
        **options,
        attention_options={"scale": float(config.attention_multiplier)},
        embedding_multiplier=float(config.embedding_multiplier),
        residual_multiplier=float(config.residual_multiplier),
        logits_multiplier=1 / float(config.logits_scaling),
    )


def granitemoe(config: PretrainedConfig) -> Architecture:
    """Granite 3 1B-A400M and 3B-A800M, whose checkpoints stack the experts."""
    module = "block_sparse_moe"
    experts = mixture(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        experts=read.size(config, "num_local_experts"),
        top_k=read.size(config, "num_experts_per_tok"),
        router=Router(
            f"{module}.router",
            scoring="softmax_of_chosen",
            aliases={f"{module}.router.layer.weight": f"{module}.router.weight"},
        ),
        module=module,
        stacked_in=(f"{module}.experts",),
    )
    up, down = experts.stacked
    published = (
        Stacked(f"{module}.input_linear.weight", up.holds),
        Stacked(f"{module}.output_linear.weight", down.holds),
    )
    experts = replace(experts, stacked=(*published, *experts.stacked))
    return granite(config, (experts,) * read.size(config, "num_hidden_layers"))


def granite4(config: PretrainedConfig) -> Architecture:
    """The dense Granite 4, whose config is that of the hybrids; gate and up are one matrix.

    Raises UnsupportedModelError for layers of state spaces and for mixtures.
    """
    read.refuse(config, num_local_experts=0)
    kinds = set(config.layers_block_type)
    if kinds != {"full_attention"}:
        raise UnsupportedModelError(
            f"layer_types has {', '.join(sorted(kinds))}; of {config.model_type} models those are "
            "supported whose layers are attention alone"
        )
    layers = read.size(config, "num_hidden_layers")
    mlp = fused_gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "shared_intermediate_size"),
        read.activation(config),
        names=("shared_mlp.input_linear", "shared_mlp.output_linear"),
    )
    rotates = config.position_embedding_type == "rope"
    ropes = None if rotates else (None,) * layers
    return granite(config, (mlp,) * layers, ropes=ropes)


FAMILIES = {"granitemoehybrid": granite4, "granite": granite, "granitemoe": granitemoe}
