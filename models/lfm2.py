"""LFM2 (350M to 2.6B): short convolutions, and attention in some layers."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Fold, Linear, LinearGroup, Norm, ShortConvolution
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp


def lfm2(config: PretrainedConfig) -> Architecture:
    """Llama's layers under other names; those whose type is ``conv`` have no attention."""
    hidden = read.size(config, "hidden_size")
    mlp = gated_mlp(
        hidden,
        _intermediate(config),
        "silu",
        norm="ffn_norm",
        module="feed_forward",
        names=("w1", "w3", "w2"),
    )
    convolution = short_convolution(hidden, read.size(config, "conv_L_cache"), config.conv_bias)
    kinds = read.layer_types(config, "full_attention", "conv")
    return decoder(
        config,
        mlp=mlp,
        mixers=tuple(convolution if kind == "conv" else None for kind in kinds),
        attention_options={
            "bias": False,
            "norm": "operator_norm",
            "output": "out_proj",
            "qk_norm": "head",
            "q_norm": "self_attn.q_layernorm",
            "k_norm": "self_attn.k_layernorm",
        },
        layer_options={"pre_attention": "operator_norm", "pre_mlp": "ffn_norm"},
        norm=Norm(float(config.norm_eps)),
        final_norm="model.embedding_norm",
    )


def short_convolution(hidden: int, taps: int, bias: bool) -> ShortConvolution:
    """The mixer of a layer without attention."""
    source = Linear("conv.in_proj", 3 * hidden, hidden, bias)
    # The output layer reads a product with the second third of what the input layer computes.
    fold = Fold(source.name, hidden, 2 * hidden)
    output = Linear("conv.out_proj", hidden, hidden, bias)
    return ShortConvolution(
        channels=hidden,
        taps=taps,
        input=LinearGroup(source.name, (source,), Fold("operator_norm")),
        output=LinearGroup(output.name, (output,), fold),
        conv="conv.conv",
        bias=bias,
    )


def _intermediate(config: PretrainedConfig) -> int:
    """The width of the MLP: two thirds of the setting, rounded up, if the config says so."""
    width = read.size(config, "intermediate_size")
    if not config.block_auto_adjust_ff_dim:
        return width
    width = 2 * width // 3
    if config.block_ffn_dim_multiplier is not None:
        multiple = read.size(config, "block_multiple_of")
        width = -(-int(config.block_ffn_dim_multiplier * width) // multiple) * multiple
    return width


FAMILIES = {"lfm2": lfm2}
