"""Granite 3 and 4: Llama's layers with four multipliers; mixtures; Granite 4's state spaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from nybble.models import (
    Architecture,
    Mixture,
    Mlp,
    Router,
    Stacked,
)
from nybble.models import config as read
from nybble.models.config import UnsupportedModelError
from nybble.models.llama import decoder
from nybble.models.parts import fused_gated_mlp, mamba, mixture


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
    """Granite 3 1B-A400M and 3B-A800M."""
    return granite(config, (_experts(config),) * read.size(config, "num_hidden_layers"))


def granite4(config: PretrainedConfig) -> Architecture:
    """Granite 4: state spaces in most layers, or in none; an MLP beside the mixture, or alone."""
    layers = read.size(config, "num_hidden_layers")
    kinds = read.layer_types(config, "full_attention", "linear_attention")
    sparse = read.size(config, "num_local_experts", least=0) > 0
    shared = fused_gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "shared_intermediate_size"),
        read.activation(config),
        # What feeds the experts feeds the router too, so nothing is folded into the norm.
        norm=None if sparse else "post_attention_layernorm",
        names=("shared_mlp.input_linear", "shared_mlp.output_linear"),
    )
    mixer = mamba(config) if "linear_attention" in kinds else None
    # Unset, or as published models say it, there are no positions.
    if config.position_embedding_type not in ("rope", "nope", None):
        raise UnsupportedModelError(
            f"position_embedding_type is {config.position_embedding_type!r}; supported are 'rope' "
            "and 'nope'"
        )
    rotates = config.position_embedding_type == "rope"
    return granite(
        config,
        (_experts(config, shared=shared) if sparse else shared,) * layers,
        mixers=tuple(mixer if kind == "linear_attention" else None for kind in kinds),
        ropes=None if rotates else (None,) * layers,
    )


def _experts(config: PretrainedConfig, **options: Any) -> Mixture:
    """A mixture whose checkpoints stack the experts."""
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
        **options,
    )
    up, down = experts.stacked
    published = (
        Stacked(f"{module}.input_linear.weight", up.holds),
        Stacked(f"{module}.output_linear.weight", down.holds),
    )
    return replace(experts, stacked=(*published, *experts.stacked), always_stacked=True)


FAMILIES = {"granitemoehybrid": granite4, "granite": granite, "granitemoe": granitemoe}
