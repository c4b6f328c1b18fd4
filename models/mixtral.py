"""Mixtral: Mistral's attention with mixtures of experts."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Router
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import mixture


def mixtral(config: PretrainedConfig) -> Architecture:
    """``w1`` is the gate, ``w3`` up and ``w2`` down."""
    experts = mixture(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        experts=read.size(config, "num_local_experts"),
        top_k=read.size(config, "num_experts_per_tok"),
        router=Router(
            "block_sparse_moe.gate",
            renormalize=True,
            aliases={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
        ),
        module="block_sparse_moe",
        names=("w1", "w3", "w2"),
    )
    layers = read.size(config, "num_hidden_layers")
    return decoder(config, windows=read.windows(config), mlps=(experts,) * layers)


FAMILIES = {"mixtral": mixtral}
