"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B) and Qwen3-MoE (Qwen3-30B-A3B, 235B-A22B, Coder)."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Mixture, Mlp, Router
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp, mixture


def sparse_mlp(
    config: PretrainedConfig, *, shared: Mlp | None = None, renormalize: bool = True
) -> Mixture:
    """A mixture, with a shared expert whose output a gate weighs."""
    return mixture(
        read.size(config, "hidden_size"),
        read.size(config, "moe_intermediate_size"),
        read.activation(config),
        experts=read.size(config, "num_experts"),
        top_k=read.size(config, "num_experts_per_tok"),
        router=Router("mlp.gate", renormalize=renormalize),
        shared=shared,
        shared_gate=None if shared is None else "mlp.shared_expert_gate",
    )


def shared_expert(config: PretrainedConfig) -> Mlp:
    """The MLP that every token passes beside those of its experts."""
    return gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "shared_expert_intermediate_size"),
        read.activation(config),
        norm=None,
        module="mlp.shared_expert",
    )


def mlps(config: PretrainedConfig, *, shared: Mlp | None = None) -> list[Mlp | Mixture]:
    """Every ``decoder_sparse_step``-th layer is a mixture, except for ``mlp_only_layers``."""
    dense = gated_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
    )
    sparse = sparse_mlp(config, shared=shared, renormalize=bool(config.norm_topk_prob))
    step, only_dense = read.size(config, "decoder_sparse_step"), config.mlp_only_layers
    return [
        sparse if (index + 1) % step == 0 and index not in only_dense else dense
        for index in range(read.size(config, "num_hidden_layers"))
    ]


def qwen2_moe(config: PretrainedConfig) -> Architecture:
    """Qwen2's attention; a shared expert, whose output a gate weighs."""
    return decoder(
        config,
        windows=read.windows(config),
        mlps=mlps(config, shared=shared_expert(config)),
        attention_options={"bias": bool(config.qkv_bias), "output_bias": False},
    )


def qwen3_moe(config: PretrainedConfig) -> Architecture:
    """Qwen3's attention, with one window in all layers or none."""
    return decoder(
        config,
        windows=read.windows(config),
        mlps=mlps(config),
        attention_options={"qk_norm": "head"},
        peft_seeks_experts=True,
    )


FAMILIES = {"qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe}
