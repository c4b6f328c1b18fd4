"""Parts that many families share, under the names that Llama gave them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nybble.kernels.activation import Activation
from nybble.models.architecture import Attention, Fold, Linear, LinearGroup, Mlp, Rope


def attention(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    rope: Rope | None,
    window: int = 0,
    scale: float | None = None,
    bias: bool = False,
    output_bias: bool | None = None,
    norm: str | None = "input_layernorm",
    output: str = "o_proj",
    **options: Any,
) -> Attention:
    """Attention with separate ``q_proj``, ``k_proj`` and ``v_proj``, and ``o_proj``.

    scale: head_dim ** −0.5 if None.
    bias: whether q, k and v have one; output_bias: whether o has one, as ``bias`` if None.
    norm: the norm whose output is read, None if the residual is read as it is.
    options: further fields of :class:`Attention`.
    """
    queries, keys = heads * head_dim, kv_heads * head_dim
    values = Linear("self_attn.v_proj", keys, hidden, bias)
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv=LinearGroup(
            "self_attn.qkv_proj",
            (
                Linear("self_attn.q_proj", queries, hidden, bias),
                Linear("self_attn.k_proj", keys, hidden, bias),
                values,
            ),
            Fold(norm) if norm else None,
        ),
        output=LinearGroup(
            f"self_attn.{output}",
            (
                Linear(
                    f"self_attn.{output}",
                    hidden,
                    queries,
                    bias if output_bias is None else output_bias,
                ),
            ),
            Fold(values.name, 0, keys, shared=heads // kv_heads, run=head_dim),
        ),
        scale=head_dim**-0.5 if scale is None else scale,
        rope=rope,
        window=window,
        **options,
    )


def fused_attention(hidden: int, separate: Attention) -> Attention:
    """``separate`` in checkpoints which hold queries, keys and values as one ``qkv_proj``."""
    queries = separate.heads * separate.head_dim
    keys = separate.kv_heads * separate.head_dim
    qkv = Linear("self_attn.qkv_proj", queries + 2 * keys, hidden)
    values = Fold(
        qkv.name,
        queries + keys,
        queries + 2 * keys,
        shared=separate.heads // separate.kv_heads,
        run=separate.head_dim,
    )
    return replace(
        separate,
        qkv=replace(separate.qkv, linears=(qkv,)),
        output=replace(separate.output, fold=values),
    )


def gated_mlp(
    hidden: int,
    intermediate: int,
    activation: Activation,
    *,
    bias: bool = False,
    norm: str | None = "post_attention_layernorm",
) -> Mlp:
    """``down_proj(activation(gate_proj) · up_proj)``."""
    up = Linear("mlp.up_proj", intermediate, hidden, bias)
    return Mlp(
        up=LinearGroup(
            "mlp.gate_up_proj",
            (Linear("mlp.gate_proj", intermediate, hidden, bias), up),
            Fold(norm) if norm else None,
        ),
        down=LinearGroup(
            "mlp.down_proj",
            (Linear("mlp.down_proj", hidden, intermediate, bias),),
            Fold(up.name, 0, intermediate),
        ),
        activation=activation,
    )


def fused_gated_mlp(
    hidden: int,
    intermediate: int,
    activation: Activation,
    *,
    norm: str | None = "post_attention_layernorm",
) -> Mlp:
    """A gated MLP whose checkpoints hold gate and up as one ``gate_up_proj`` (Phi-3, GLM-4)."""
    both = Linear("mlp.gate_up_proj", 2 * intermediate, hidden)
    return Mlp(
        up=LinearGroup(both.name, (both,), Fold(norm) if norm else None),
        down=LinearGroup(
            "mlp.down_proj",
            (Linear("mlp.down_proj", hidden, intermediate),),
            Fold(both.name, intermediate, 2 * intermediate),
        ),
        activation=activation,
    )


def plain_mlp(
    hidden: int,
    intermediate: int,
    activation: Activation,
    *,
    bias: bool = False,
    norm: str | None = "post_attention_layernorm",
    up: str = "up_proj",
    down: str = "down_proj",
) -> Mlp:
    """``down(activation(up))``: the activation keeps scales from being folded before ``down``."""
    return Mlp(
        up=LinearGroup(
            f"mlp.{up}",
            (Linear(f"mlp.{up}", intermediate, hidden, bias),),
            Fold(norm) if norm else None,
        ),
        down=LinearGroup(f"mlp.{down}", (Linear(f"mlp.{down}", hidden, intermediate, bias),)),
        activation=activation,
        gated=False,
    )
