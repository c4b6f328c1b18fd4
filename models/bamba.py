"""Bamba: Mamba-2's state spaces, and attention in some layers."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import config as read
from nybble.models.architecture import (
    Architecture,
    Fold,
    Linear,
    LinearGroup,
    StateSpace,
    UnsupportedModelError,
)
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp


def bamba(config: PretrainedConfig) -> Architecture:
    """Llama's layers under other names; half of a head is rotated."""
    mixer, kinds = state_space(config), config.layers_block_type
    return decoder(
        config,
        mlp=gated_mlp(
            read.size(config, "hidden_size"),
            read.size(config, "intermediate_size"),
            read.activation(config),
            bias=bool(config.mlp_bias),
            norm="pre_ff_layernorm",
            module="feed_forward",
        ),
        mixers=tuple(mixer if kind == "linear_attention" else None for kind in kinds),
        layer_options={"pre_mlp": "pre_ff_layernorm"},
        final_norm="model.final_layernorm",
    )


def state_space(config: PretrainedConfig) -> StateSpace:
    """The mixer of a layer without attention, by the settings of Bamba and Granite 4."""
    read.refuse(config, hidden_act="silu", time_step_limit=(0.0, float("inf")))
    hidden, bias = read.size(config, "hidden_size"), bool(config.mamba_proj_bias)
    heads, head_dim = read.size(config, "mamba_n_heads"), read.size(config, "mamba_d_head")
    key_groups, state_dim = read.size(config, "mamba_n_groups"), read.size(config, "mamba_d_state")
    values = heads * head_dim
    if heads % key_groups or values != int(config.mamba_expand * hidden):
        raise UnsupportedModelError(
            f"mamba_n_heads is {heads}, expected a multiple of mamba_n_groups ({key_groups}), and "
            f"with mamba_d_head ({head_dim}) mamba_expand · hidden_size entries together"
        )
    source = Linear("mamba.in_proj", 2 * values + 2 * key_groups * state_dim + heads, hidden, bias)
    output = Linear("mamba.out_proj", hidden, values, bias)
    return StateSpace(
        heads=heads,
        head_dim=head_dim,
        key_groups=key_groups,
        state_dim=state_dim,
        taps=read.size(config, "mamba_d_conv"),
        input=LinearGroup(source.name, (source,), Fold("input_layernorm")),
        output=LinearGroup(output.name, (output,)),
        norm_eps=float(config.rms_norm_eps),
        bias=bool(config.mamba_conv_bias),
    )


FAMILIES = {"bamba": bamba}
