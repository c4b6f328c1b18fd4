"""GLM-4.5, 4.6 and their Air models: sigmoid routing, shared experts, first layers dense."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.deepseek import layers_after, sigmoid_router
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp, mixture


def glm4_moe(config: PretrainedConfig) -> Architecture:
    """Checkpoints hold a layer after the last, which is an MTP head."""
    hidden, activation = read.size(config, "hidden_size"), read.activation(config)
    intermediate = read.size(config, "moe_intermediate_size")
    layers = read.size(config, "num_hidden_layers")
    dense = read.size(config, "first_k_dense_replace", least=0)
    first = gated_mlp(hidden, read.size(config, "intermediate_size"), activation)
    experts = mixture(
        hidden,
        intermediate,
        activation,
        experts=read.size(config, "n_routed_experts"),
        top_k=read.size(config, "num_experts_per_tok"),
        router=sigmoid_router(config),
        shared=gated_mlp(
            hidden,
            intermediate * read.size(config, "n_shared_experts"),
            activation,
            norm=None,
            module="mlp.shared_experts",
        ),
    )
    return decoder(
        config,
        mlps=[first if index < dense else experts for index in range(layers)],
        attention_options={
            "output_bias": False,
            "qk_norm": "head" if config.use_qk_norm else None,
        },
        peft_seeks_experts=True,
        **layers_after(config),
    )


FAMILIES = {"glm4_moe": glm4_moe}
