"""Nemotron-H and Nemotron 3: each layer is a state space (Mamba-2), attention or an MLP alone."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Layer, Mixer, Mixture, Mlp, Norm
from nybble.models import config as read
from nybble.models.deepseek import sigmoid_router
from nybble.models.parts import attention, mixture, plain_mlp, state_space


def nemotron_h(config: PretrainedConfig) -> Architecture:
    """No layer has positions. Layers after the last, which predict several tokens, are not used.

    transformers clamps ``dt`` to ``time_step_min`` in prompts, but not in the tokens that follow;
    NVIDIA's own code and vLLM clamp neither, and so does this.
    """
    parts = {
        "linear_attention": _state_space,
        "full_attention": _attention,
        "mlp": _mlp,
        "moe": _mixture,
    }
    kinds = read.layer_types(config, *parts)
    layers = {kind: _alone(parts[kind](config)) for kind in dict.fromkeys(kinds)}
    return Architecture(
        family=config.model_type,
        vocab=read.size(config, "vocab_size"),
        hidden=read.size(config, "hidden_size"),
        layers=tuple(layers[kind] for kind in kinds),
        norm=Norm(float(config.layer_norm_epsilon), offset=0.0),
        max_position_embeddings=read.size(config, "max_position_embeddings"),
        tied=bool(config.tie_word_embeddings),
        embedding="model.embeddings",
        final_norm="model.norm_f",
        unused=("mtp.",),
    )


def _alone(part: Mixer | Mlp | Mixture) -> Layer:
    """A layer that has nothing else."""
    if isinstance(part, Mlp | Mixture):
        return Layer((), part, pre_attention=None, pre_mlp="norm")
    return Layer((part,), None, pre_attention="norm", pre_mlp=None)


def _state_space(config: PretrainedConfig) -> Mixer:
    read.refuse(config, mamba_hidden_act="silu", time_step_limit=(0.0, float("inf")))
    return state_space(
        read.size(config, "hidden_size"),
        heads=read.size(config, "mamba_num_heads"),
        head_dim=read.size(config, "mamba_head_dim"),
        key_groups=read.size(config, "n_groups"),
        state_dim=read.size(config, "ssm_state_size"),
        taps=read.size(config, "conv_kernel"),
        norm_eps=float(config.layer_norm_epsilon),
        bias=bool(config.use_bias),
        conv_bias=bool(config.use_conv_bias),
        norm="norm",
        module="mixer",
    )


def _attention(config: PretrainedConfig) -> Mixer:
    hidden, heads = read.size(config, "hidden_size"), read.head_sizes(config)
    return attention(hidden, *heads, rope=None, norm="norm", module="mixer")


def _mlp(config: PretrainedConfig) -> Mlp:
    return plain_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config, "mlp_hidden_act"),
        bias=bool(config.mlp_bias),
        norm="norm",
        module="mixer",
    )


def _mixture(config: PretrainedConfig) -> Mixture:
    """Nemotron 3 Nano's; the experts of larger ones read a projection of hidden states."""
    read.refuse(config, moe_latent_size=None)
    hidden, activation = read.size(config, "hidden_size"), read.activation(config, "mlp_hidden_act")
    return mixture(
        hidden,
        read.size(config, "moe_intermediate_size"),
        activation,
        experts=read.size(config, "n_routed_experts"),
        top_k=read.size(config, "num_experts_per_tok"),
        router=sigmoid_router(config, "mixer.gate"),
        module="mixer",
        names=("up_proj", "down_proj"),
        stacked_in=("mixer.experts",),
        shared=plain_mlp(
            hidden,
            read.size(config, "moe_shared_expert_intermediate_size"),
            activation,
            bias=bool(config.mlp_bias),
            norm=None,
            module="mixer.shared_experts",
        ),
    )


FAMILIES = {"nemotron_h": nemotron_h}
