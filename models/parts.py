"""Parts that many families share, under the names that Llama gave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nybble.kernels.activation import Activation
from nybble.models import Attention, Fold, Linear, LinearGroup, Mixture, Mlp, Rope, Router, Stacked
from nybble.models.config import UnsupportedModelError


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
    gated: bool = False,
    **options: Any,
) -> Attention:
    """Attention with separate ``q_proj``, ``k_proj`` and ``v_proj``, and ``o_proj``.

    scale: head_dim ** −0.5 if None.
    bias: whether q, k and v have one; output_bias: whether o has one, as ``bias`` if None.
    gated: see :class:`Attention`.
    norm: the norm whose output is read, None if the residual is read as it is.
    options: further fields of :class:`Attention`.
    """
    attended, keys = heads * head_dim, kv_heads * head_dim
    queries = 2 * attended if gated else attended
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
                    attended,
                    bias if output_bias is None else output_bias,
                ),
            ),
            Fold(values.name, 0, keys, shared=heads // kv_heads, run=head_dim),
        ),
        scale=head_dim**-0.5 if scale is None else scale,
        rope=rope,
        window=window,
        gated=gated,
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
    module: str = "mlp",
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    fold: bool = True,
) -> Mlp:
    """``down_proj(activation(gate_proj) · up_proj)``.

    module: what holds the linear layers; names: what they are called there.
    fold: whether what ``down_proj`` reads is linear in ``up_proj``'s outputs.
    """
    gate, up, down = (f"{module}.{name}" for name in names)
    return Mlp(
        up=LinearGroup(
            f"{module}.gate_up_proj",
            (Linear(gate, intermediate, hidden, bias), Linear(up, intermediate, hidden, bias)),
            Fold(norm) if norm else None,
        ),
        down=LinearGroup(
            down,
            (Linear(down, hidden, intermediate, bias),),
            Fold(up, 0, intermediate) if fold else None,
        ),
        activation=activation,
    )


def mixture(
    hidden: int,
    intermediate: int,
    activation: Activation,
    *,
    experts: int,
    top_k: int,
    router: Router,
    module: str = "mlp",
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    stacked_in: Sequence[str] = ("mlp.experts",),
    **options: Any,
) -> Mixture:
    """Gated experts without biases.

    module: what holds the experts; names: what an expert's linear layers are called.
    stacked_in: modules that hold ``gate_up_proj (experts, 2 · intermediate, hidden)`` and
        ``down_proj (experts, hidden, intermediate)`` in checkpoints that stack the experts.
    options: further fields of :class:`Mixture`.

    Raises UnsupportedModelError if there are fewer experts than a token uses.
    """
    if not 1 <= top_k <= experts:
        raise UnsupportedModelError(f"a token uses {top_k} experts, but there are {experts}")
    gate, up, down = (f"{module}.experts.{{}}.{name}.weight" for name in names)
    # What feeds the experts feeds the router too, so nothing is folded into the norm.
    return Mixture(
        experts=tuple(
            gated_mlp(
                hidden,
                intermediate,
                activation,
                norm=None,
                module=f"{module}.experts.{expert}",
                names=names,
            )
            for expert in range(experts)
        ),
        top_k=top_k,
        router=router,
        stacked=tuple(
            stacked
            for each in stacked_in
            for stacked in (
                Stacked(f"{each}.gate_up_proj", (gate, up)),
                Stacked(f"{each}.down_proj", (down,)),
            )
        ),
        **options,
    )


def fused_gated_mlp(
    hidden: int,
    intermediate: int,
    activation: Activation,
    *,
    norm: str | None = "post_attention_layernorm",
    names: Sequence[str] = ("mlp.gate_up_proj", "mlp.down_proj"),
) -> Mlp:
    """A gated MLP whose checkpoints hold gate and up as one matrix (Phi-3, GLM-4, Granite 4)."""
    up, down = names
    both = Linear(up, 2 * intermediate, hidden)
    return Mlp(
        up=LinearGroup(both.name, (both,), Fold(norm) if norm else None),
        down=LinearGroup(
            down,
            (Linear(down, hidden, intermediate),),
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
