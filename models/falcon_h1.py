"""Falcon-H1: attention and a state space (Mamba-2) side by side in every layer; multipliers."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from nybble.models import Architecture, Attention, Mlp, StateSpace
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp, mamba


def falcon_h1(config: PretrainedConfig) -> Architecture:
    """Attention and state space read one norm, so neither's scales can be folded into it."""
    # What multiplies an input is applied to the outputs here, which do not have it in their bias.
    read.refuse(config, attention_bias=False, mamba_proj_bias=False)
    scale = read.head_sizes(config)[2] ** -0.5 * float(config.key_multiplier)
    base = decoder(
        config,
        mlp=_mlp(config),
        attention_options={"norm": None, "scale": scale},
        layer_options={"pre_mlp": "pre_ff_layernorm"},
        final_norm="model.final_layernorm",
        embedding_multiplier=float(config.embedding_multiplier),
        logits_multiplier=float(config.lm_head_multiplier),
    )
    attention = _multiplied(config, base.plain_attentions[0])
    mixers = (attention, _state_space(config))
    return replace(base, layers=tuple(replace(layer, mixers=mixers) for layer in base.layers))


def _mlp(config: PretrainedConfig) -> Mlp:
    hidden = read.size(config, "hidden_size")
    intermediate = read.size(config, "intermediate_size")
    mlp = gated_mlp(
        hidden,
        intermediate,
        read.activation(config),
        bias=bool(config.mlp_bias),
        norm="pre_ff_layernorm",
        module="feed_forward",
    )
    gate, down = map(float, config.mlp_multipliers)
    return replace(
        mlp,
        up=mlp.up.multiplied((intermediate, gate), (intermediate, 1.0)),
        down=mlp.down.multiplied((hidden, down)),
    )


def _multiplied(config: PretrainedConfig, attention: Attention) -> Attention:
    before, after = config.attention_in_multiplier, config.attention_out_multiplier
    return replace(
        attention,
        qkv=attention.qkv.multiplied((attention.qkv.out, float(before))),
        output=attention.output.multiplied((attention.output.out, float(after))),
    )


def _state_space(config: PretrainedConfig) -> StateSpace:
    if config.mamba_rms_norm:
        read.refuse(config, mamba_norm_before_gate=False)
    about = mamba(
        config,
        normed=bool(config.mamba_rms_norm),
        output_bias=bool(config.projectors_bias),
        norm=None,
    )
    sizes = (about.values, about.values, about.keys, about.keys, about.heads)
    before = float(config.ssm_in_multiplier)
    runs = [
        (size, before * float(multiplier))
        for size, multiplier in zip(sizes, config.ssm_multipliers, strict=True)
    ]
    after = float(config.ssm_out_multiplier)
    return replace(
        about,
        input=about.input.multiplied(*runs),
        output=about.output.multiplied((about.output.out, after)),
    )


FAMILIES = {"falcon_h1": falcon_h1}
