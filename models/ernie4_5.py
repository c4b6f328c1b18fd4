"""ERNIE 4.5: Llama's layers with pairs rotated; dense models, and mixtures (text only)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from nybble.models import Architecture, Mixture, Mlp, Mtp, Router
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp, mixture


def ernie4_5(
    config: PretrainedConfig, experts: Mixture | None = None, **options: Any
) -> Architecture:
    """``use_bias`` is for every linear layer.

    experts: what some layers have instead of the MLP; options: fields of :class:`Architecture`.
    """
    bias = bool(config.use_bias)
    rope = read.rope(config, read.head_sizes(config)[2], interleaved=True)
    mlp = _dense(config)
    layers = read.size(config, "num_hidden_layers")
    mlps: list[Mlp | Mixture] = [mlp] * layers
    if experts is not None:
        step = read.size(config, "moe_layer_interval")
        first = read.size(config, "moe_layer_start_index", least=0)
        for index in range(first, config.moe_layer_end_index + 1):
            if (index + 1) % step == 0 and index < layers:
                mlps[index] = experts
    return decoder(
        config, ropes=(rope,) * layers, mlps=mlps, attention_options={"bias": bias}, **options
    )


def ernie4_5_moe(config: PretrainedConfig) -> Architecture:
    """A bias corrects which experts are chosen; shared experts are one MLP.

    Raises UnsupportedModelError for biases of experts, which no published model has.
    """
    read.refuse(config, use_bias=False)
    hidden, activation = read.size(config, "hidden_size"), read.activation(config)
    intermediate = read.size(config, "moe_intermediate_size")
    shared = read.size(config, "moe_num_shared_experts", least=0)
    bias = "mlp.moe_statics.e_score_correction_bias"
    experts = mixture(
        hidden,
        intermediate,
        activation,
        experts=read.size(config, "moe_num_experts"),
        top_k=read.size(config, "moe_k"),
        router=Router(
            "mlp.gate",
            renormalize=True,
            least_sum=read.number("moe_norm_min", config.moe_norm_min, least=0.0),
            correction_bias=bias,
            aliases={"mlp.gate.moe_statics.e_score_correction_bias": bias},
        ),
        shared=gated_mlp(
            hidden, intermediate * shared, activation, norm=None, module="mlp.shared_experts"
        )
        if shared
        else None,
    )
    return ernie4_5(
        config, experts, unused=("model.mtp_",), mtp=_mtp(config), peft_seeks_experts=True
    )


def _dense(config: PretrainedConfig) -> Mlp:
    return gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        bias=bool(config.use_bias),
    )


def _mtp(config: PretrainedConfig) -> Mtp | None:
    """The head of published mixtures: a layer with an MLP, read by the model's own last norm.

    Names: FastDeploy's ``ernie4_5_mtp``; so has transformers' list of tensors that are not read.
    """
    if not getattr(config, "num_nextn_predict_layers", None):
        return None
    parts = [f"model.mtp_{part}.0" for part in ("block", "emb_norm", "hidden_norm", "linear_proj")]
    layer, embedding_norm, hidden_norm, join = parts
    return Mtp(
        layer=layer + ".",
        embedding_norm=embedding_norm,
        hidden_norm=hidden_norm,
        join=join,
        norm="model.norm",
        prefixes=tuple(part + "." for part in parts),
        mlp=_dense(config),
    )


FAMILIES = {"ernie4_5": ernie4_5, "ernie4_5_moe": ernie4_5_moe}
