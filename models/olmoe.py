"""OLMoE: Llama's layers with mixtures of experts, and norms of all queries and keys."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Router
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import mixture


def olmoe(config: PretrainedConfig) -> Architecture:
    """Raises UnsupportedModelError for ``clip_qkv``, which no published OLMoE sets."""
    read.refuse(config, clip_qkv=None)
    experts = mixture(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        experts=read.size(config, "num_experts"),
        top_k=read.size(config, "num_experts_per_tok"),
        router=Router("mlp.gate", renormalize=bool(config.norm_topk_prob)),
    )
    layers = read.size(config, "num_hidden_layers")
    return decoder(config, mlps=(experts,) * layers, attention_options={"qk_norm": "all"})


FAMILIES = {"olmoe": olmoe}
