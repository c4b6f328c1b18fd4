"""DeepSeek-V2 and V3 (R1 too), and what shares their latent attention: GLM-4.7-Flash, Youtu-LLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from nybble.models import (
    Architecture,
    Fold,
    LatentAttention,
    Linear,
    LinearGroup,
    Mixture,
    Mlp,
    Mtp,
    Rope,
    Router,
)
from nybble.models import config as read
from nybble.models.config import UnsupportedModelError
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp, mixture

# Of the norms of latents, whatever rms_norm_eps is.
_LATENT_EPS = 1e-6


def deepseek_v2(config: PretrainedConfig) -> Architecture:
    """Experts are chosen by a softmax over all, in the best groups if ``topk_method`` says so."""
    read.refuse(config, scoring_func="softmax", moe_layer_freq=1, norm_topk_prob=False)
    methods = ("greedy", "group_limited_greedy")
    if config.topk_method not in methods:
        raise UnsupportedModelError(
            f"topk_method is {config.topk_method!r}; supported are {' and '.join(methods)}"
        )
    grouped = config.topk_method == "group_limited_greedy"
    router = Router(
        "mlp.gate",
        scaling_factor=float(config.routed_scaling_factor),
        groups=read.size(config, "n_group") if grouped else 1,
        topk_groups=read.size(config, "topk_group") if grouped else 1,
    )
    return _decoder(config, _mlps(config, router), interleaved=True, peft_seeks_experts=True)


def deepseek_v3(config: PretrainedConfig) -> Architecture:
    """Checkpoints hold a layer after the last, which is an MTP head."""
    read.refuse(config, moe_layer_freq=1)
    return _decoder(
        config,
        _mlps(config, sigmoid_router(config)),
        interleaved=bool(config.rope_interleave),
        peft_seeks_experts=True,
        **layers_after(config),
    )


def glm4_moe_lite(config: PretrainedConfig) -> Architecture:
    """DeepSeek-V3's layers; which of them are dense is said layer by layer."""
    layers = read.size(config, "num_hidden_layers")
    dense, sparse = _dense(config), _sparse(config, sigmoid_router(config))
    kinds: dict[str, Mlp | Mixture] = {"dense": dense, "sparse": sparse}
    unknown = set(config.mlp_layer_types).difference(kinds)
    if unknown or len(config.mlp_layer_types) != layers:
        raise UnsupportedModelError(
            f"mlp_layer_types is {config.mlp_layer_types!r}, expected 'dense' or 'sparse' for each "
            f"of {layers} layers"
        )
    return _decoder(
        config,
        [kinds[kind] for kind in config.mlp_layer_types],
        interleaved=bool(config.rope_interleave),
        peft_seeks_experts=True,
        **layers_after(config),
    )


def youtu(config: PretrainedConfig) -> Architecture:
    """DeepSeek-V3's attention, and MLPs in all layers."""
    layers = read.size(config, "num_hidden_layers")
    return _decoder(config, (_dense(config),) * layers, interleaved=bool(config.rope_interleave))


def layers_after(config: PretrainedConfig) -> dict[str, Any]:
    """Fields of :class:`Architecture` for layers after the last, which predict further tokens.

    The first of them is an MTP head; no published model has another.
    """
    layers = read.size(config, "num_hidden_layers")
    name = "num_nextn_predict_layers"
    if not getattr(config, name, None):
        return {}
    count = read.size(config, name)
    first = f"model.layers.{layers}."
    head = Mtp(
        layer=first,
        embedding_norm=first + "enorm",
        hidden_norm=first + "hnorm",
        join=first + "eh_proj",
        norm=first + "shared_head.norm",
        prefixes=(first,),
        copies=(first + "embed_tokens.", first + "shared_head.head."),
    )
    unused = tuple(f"model.layers.{layers + index}." for index in range(count))
    return {"unused": unused, "mtp": head}


def _decoder(
    config: PretrainedConfig,
    mlps: Sequence[Mlp | Mixture],
    *,
    interleaved: bool,
    **options: Any,
) -> Architecture:
    layers = read.size(config, "num_hidden_layers")
    latent = latent_attention(config, interleaved=interleaved)
    return decoder(config, mlps=mlps, mixers=(latent,) * layers, **options)


def sigmoid_router(config: PretrainedConfig, module: str = "mlp.gate") -> Router:
    """V3's: each expert's score is a sigmoid, and a bias counts for the choice alone."""
    read.refuse(config, scoring_func="sigmoid", topk_method="noaux_tc")
    return Router(
        module,
        scoring="sigmoid",
        correction_bias=f"{module}.e_score_correction_bias",
        renormalize=bool(config.norm_topk_prob),
        scaling_factor=float(config.routed_scaling_factor),
        groups=read.size(config, "n_group"),
        topk_groups=read.size(config, "topk_group"),
        group_score="top2",
    )


def _mlps(config: PretrainedConfig, router: Router) -> list[Mlp | Mixture]:
    """Of each layer; the first are dense."""
    dense, sparse = _dense(config), _sparse(config, router)
    first = read.size(config, "first_k_dense_replace", least=0)
    return [
        dense if index < first else sparse
        for index in range(read.size(config, "num_hidden_layers"))
    ]


def _dense(config: PretrainedConfig) -> Mlp:
    return gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        bias=bool(getattr(config, "mlp_bias", False)),
    )


def _sparse(config: PretrainedConfig, router: Router) -> Mixture:
    hidden, activation = read.size(config, "hidden_size"), read.activation(config)
    intermediate = read.size(config, "moe_intermediate_size")
    return mixture(
        hidden,
        intermediate,
        activation,
        experts=read.size(config, "n_routed_experts"),
        top_k=read.size(config, "num_experts_per_tok"),
        router=router,
        shared=gated_mlp(
            hidden,
            intermediate * read.size(config, "n_shared_experts"),
            activation,
            bias=bool(getattr(config, "mlp_bias", False)),
            norm=None,
            module="mlp.shared_experts",
        ),
    )


def latent_attention(config: PretrainedConfig, *, interleaved: bool) -> LatentAttention:
    """Latent attention under DeepSeek's names.

    interleaved: see :class:`Rope`.
    """
    hidden, heads = read.size(config, "hidden_size"), read.size(config, "num_attention_heads")
    rotated, latent = read.size(config, "qk_rope_head_dim"), read.size(config, "kv_lora_rank")
    keys, values = read.size(config, "qk_nope_head_dim"), read.size(config, "v_head_dim")
    bias = bool(config.attention_bias)
    queries = heads * (keys + rotated)
    query = None
    if config.q_lora_rank is None:
        first = Linear("self_attn.q_proj", queries, hidden)
    else:
        rank = read.size(config, "q_lora_rank")
        first = Linear("self_attn.q_a_proj", rank, hidden, bias)
        second = Linear("self_attn.q_b_proj", queries, rank)
        query = LinearGroup(second.name, (second,), Fold("self_attn.q_a_layernorm"))
    compress = Linear("self_attn.kv_a_proj_with_mqa", latent + rotated, hidden, bias)
    expand = Linear("self_attn.kv_b_proj", heads * (keys + values), latent)
    output = Linear("self_attn.o_proj", hidden, heads * values, bias)
    rope = read.rope(config, rotated, interleaved=interleaved)
    return LatentAttention(
        heads=heads,
        latent_dim=latent,
        key_dim=keys,
        value_dim=values,
        input=LinearGroup("self_attn.qkv_a_proj", (first, compress), Fold("input_layernorm")),
        query=query,
        expand=LinearGroup(expand.name, (expand,), Fold("self_attn.kv_a_layernorm")),
        # A head's values are not consecutive outputs of what feeds it.
        output=LinearGroup(output.name, (output,)),
        scale=(keys + rotated) ** -0.5 * _stretch(rope) ** 2,
        rope=rope,
        norm_eps=_LATENT_EPS,
    )


def _stretch(rope: Rope) -> float:
    """What longer contexts multiply queries and keys by, beside the factor of cos and sin."""
    share, factor = rope.parameters.get("mscale_all_dim"), rope.parameters.get("factor", 1.0)
    if rope.parameters["rope_type"] == "default" or not share or factor <= 1:
        return 1.0
    return 0.1 * float(share) * math.log(factor) + 1.0


FAMILIES = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "glm4_moe_lite": glm4_moe_lite,
    "youtu": youtu,
}
