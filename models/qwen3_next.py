"""Qwen3-Next and Qwen3.5, dense and mixtures: gated delta nets, and gated attention in some layers.

Qwen3.5's multimodal checkpoints are served as their language model; positions of texts need none of
its sections for images.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from nybble.models import Architecture, Fold, GatedDeltaNet, Linear, LinearGroup, Mtp, Norm
from nybble.models import config as read
from nybble.models.config import UnsupportedModelError
from nybble.models.llama import decoder
from nybble.models.qwen_moe import mlps, shared_expert, sparse_mlp

_MTP = Mtp(
    layer="mtp.layers.0.",
    embedding_norm="mtp.pre_fc_norm_embedding",
    hidden_norm="mtp.pre_fc_norm_hidden",
    join="mtp.fc",
    norm="mtp.norm",
    prefixes=("mtp.",),
)


def _decoder(config: PretrainedConfig, *, interleaved: bool, **options: Any) -> Architecture:
    """Qwen3's attention with a gate, norms of 1 + weight, and delta nets in the other layers.

    interleaved: see :class:`GatedDeltaNet`.
    """
    kinds = read.layer_types(config, "full_attention", "linear_attention")
    delta_net = _delta_net(config, interleaved=interleaved)
    return decoder(
        config,
        mixers=tuple(delta_net if kind == "linear_attention" else None for kind in kinds),
        attention_options={"qk_norm": "head", "gated": True},
        norm=Norm(float(config.rms_norm_eps), offset=1.0),
        unused=_MTP.prefixes,
        mtp=_MTP,
        **options,
    )


def _delta_net(config: PretrainedConfig, *, interleaved: bool) -> GatedDeltaNet:
    read.refuse(config, hidden_act="silu")
    hidden = read.size(config, "hidden_size")
    key_heads = read.size(config, "linear_num_key_heads")
    value_heads = read.size(config, "linear_num_value_heads")
    if value_heads % key_heads:
        raise UnsupportedModelError(
            f"linear_num_value_heads {value_heads} is not a multiple of linear_num_key_heads "
            f"{key_heads}"
        )
    key_dim = read.size(config, "linear_key_head_dim")
    value_dim = read.size(config, "linear_value_head_dim")
    keys, values = key_heads * key_dim, value_heads * value_dim
    if interleaved:
        parts = {"qkvz": 2 * keys + 2 * values, "ba": 2 * value_heads}
    else:
        parts = {"qkv": 2 * keys + values, "z": values, "b": value_heads, "a": value_heads}
    linears = (Linear(f"linear_attn.in_proj_{name}", out, hidden) for name, out in parts.items())
    return GatedDeltaNet(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        taps=read.size(config, "linear_conv_kernel_dim"),
        input=LinearGroup("linear_attn.in_proj", tuple(linears), Fold("input_layernorm")),
        # One norm weight serves all heads, so nothing is folded into it.
        output=LinearGroup(
            "linear_attn.out_proj", (Linear("linear_attn.out_proj", hidden, values),)
        ),
        norm_eps=float(config.rms_norm_eps),
        interleaved=interleaved,
    )


def qwen3_next(config: PretrainedConfig) -> Architecture:
    """A mixture with a gated shared expert in every ``decoder_sparse_step``-th layer."""
    return _decoder(
        config,
        interleaved=True,
        mlps=mlps(config, shared=shared_expert(config)),
        peft_seeks_experts=True,
    )


def qwen3_5(config: PretrainedConfig) -> Architecture:
    """What a delta net reads comes of four linear layers."""
    return _decoder(config, interleaved=False)


def qwen3_5_moe(config: PretrainedConfig) -> Architecture:
    """A mixture with a gated shared expert in every layer."""
    sparse = sparse_mlp(config, shared=shared_expert(config))
    layers = read.size(config, "num_hidden_layers")
    return _decoder(config, interleaved=False, mlps=(sparse,) * layers)


FAMILIES = {
    "qwen3_next": qwen3_next,
    "qwen3_5_text": qwen3_5,
    "qwen3_5_moe_text": qwen3_5_moe,
}
