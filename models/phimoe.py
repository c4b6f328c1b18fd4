"""Phi-3.5-MoE: LayerNorms, biases, longrope, and two experts chosen one after the other."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Norm, Router
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import mixture


def phimoe(config: PretrainedConfig) -> Architecture:
    """``w1`` is the gate, ``w3`` up and ``w2`` down."""
    # Its router chooses two, whatever the config says.
    read.refuse(config, num_experts_per_tok=2)
    experts = mixture(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        experts=read.size(config, "num_local_experts"),
        top_k=2,
        router=Router(
            "block_sparse_moe.gate",
            scoring="sparsemixer",
            jitter=read.number("router_jitter_noise", config.router_jitter_noise, least=0.0),
            aliases={"mlp.router.weight": "block_sparse_moe.gate.weight"},
        ),
        module="block_sparse_moe",
        names=("w1", "w3", "w2"),
    )
    layers = read.size(config, "num_hidden_layers")
    return decoder(
        config,
        windows=read.windows(config),
        mlps=(experts,) * layers,
        norm=Norm(float(config.rms_norm_eps), kind="layer", bias=True),
        head_bias=bool(config.lm_head_bias),
    )


FAMILIES = {"phimoe": phimoe}
