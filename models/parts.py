"""Parts that many families share, under the names that Llama gave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from nybble.kernels.activation import Activation
from nybble.models import (
    Attention,
    Fold,
    Linear,
    LinearGroup,
    Mixture,
    Mlp,
    Rope,
    Router,
    Stacked,
    StateSpace,
)
from nybble.models import config as read
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
    module: str = "self_attn",
    output: str = "o_proj",
    gated: bool = False,
    **options: Any,
) -> Attention:
    """Attention with separate ``q_proj``, ``k_proj`` and ``v_proj``, and ``o_proj``.

    module: what holds the linear layers; output: what the last is called there.
    scale: head_dim ** −0.5 if None.
    bias: whether q, k and v have one; output_bias: whether o has one, as ``bias`` if None.
    gated: see :class:`Attention`.
    norm: the norm whose output is read, None if the residual is read as it is.
    options: further fields of :class:`Attention`.
    """
    attended, keys = heads * head_dim, kv_heads * head_dim
    queries = 2 * attended if gated else attended
    values = Linear(f"{module}.v_proj", keys, hidden, bias)
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv=LinearGroup(
            f"{module}.qkv_proj",
            (
                Linear(f"{module}.q_proj", queries, hidden, bias),
                Linear(f"{module}.k_proj", keys, hidden, bias),
                values,
            ),
            Fold(norm) if norm else None,
        ),
        output=LinearGroup(
            f"{module}.{output}",
            (
                Linear(
                    f"{module}.{output}",
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
    """Experts without biases.

    module: what holds the experts; names: what an expert's linear layers are called: two, if it has
        no gate.
    stacked_in: modules that hold ``gate_up_proj (experts, 2 · intermediate, hidden)``, or
        ``up_proj`` if there is no gate, and ``down_proj (experts, hidden, intermediate)`` in
        checkpoints that stack the experts.
    options: further fields of :class:`Mixture`.

    Raises UnsupportedModelError if the experts cannot be chosen as ``router`` says.
    """
    _require_groups(experts, top_k, router)
    *ups, down = (f"{module}.experts.{{}}.{name}.weight" for name in names)
    together = "gate_up_proj" if len(ups) > 1 else "up_proj"

    def expert(number: int) -> Mlp:
        sizes, own = (hidden, intermediate, activation), f"{module}.experts.{number}"
        # What feeds the experts feeds the router too, so nothing is folded into the norm.
        if len(ups) > 1:
            return gated_mlp(*sizes, norm=None, module=own, names=names)
        return plain_mlp(*sizes, norm=None, module=own, up=names[0], down=names[1])

    return Mixture(
        experts=tuple(map(expert, range(experts))),
        top_k=top_k,
        router=router,
        stacked=tuple(
            stacked
            for each in stacked_in
            for stacked in (
                Stacked(f"{each}.{together}", tuple(ups)),
                Stacked(f"{each}.down_proj", (down,)),
            )
        ),
        **options,
    )


def _require_groups(experts: int, top_k: int, router: Router) -> None:
    groups, chosen = router.groups, router.topk_groups
    if experts % groups or chosen > groups:
        raise UnsupportedModelError(
            f"{experts} experts in {groups} groups, of which {chosen} are chosen: expected groups "
            "of equal size, and no more chosen than there are"
        )
    if router.group_score == "top2" and experts // groups < 2:
        raise UnsupportedModelError(
            f"{experts} experts in {groups} groups: a group's score is that of its best two, so "
            "that it has two or more"
        )
    if groups > 1 and top_k > (most := experts // groups * chosen):
        raise UnsupportedModelError(f"{top_k} experts are chosen of the {most} that can be")


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
    module: str = "mlp",
    up: str = "up_proj",
    down: str = "down_proj",
) -> Mlp:
    """``down(activation(up))``: the activation keeps scales from being folded before ``down``."""
    up, down = f"{module}.{up}", f"{module}.{down}"
    return Mlp(
        up=LinearGroup(up, (Linear(up, intermediate, hidden, bias),), Fold(norm) if norm else None),
        down=LinearGroup(down, (Linear(down, hidden, intermediate, bias),)),
        activation=activation,
        gated=False,
    )


def state_space(
    hidden: int,
    *,
    heads: int,
    head_dim: int,
    key_groups: int,
    state_dim: int,
    taps: int,
    norm_eps: float,
    normed: bool = True,
    bias: bool = False,
    output_bias: bool | None = None,
    conv_bias: bool = True,
    norm: str | None = "input_layernorm",
    module: str = "mamba",
) -> StateSpace:
    """A state space (Mamba-2) with ``in_proj`` and ``out_proj``.

    normed: whether what ``out_proj`` reads is normed.
    bias: whether ``in_proj`` has one; output_bias: whether ``out_proj`` has one, as ``bias`` if
        None; conv_bias: whether the convolution has one.
    norm: the norm of the hidden states, if its output feeds nothing else. None if it does.
    module: what holds its layers and tensors.

    Raises UnsupportedModelError if heads cannot be divided by groups.
    """
    if heads % key_groups:
        raise UnsupportedModelError(
            f"a state space has {heads} heads, expected a multiple of its {key_groups} groups"
        )
    values = heads * head_dim
    outputs = 2 * values + 2 * key_groups * state_dim + heads
    source = Linear(f"{module}.in_proj", outputs, hidden, bias)
    output = Linear(
        f"{module}.out_proj", hidden, values, bias if output_bias is None else output_bias
    )
    return StateSpace(
        heads=heads,
        head_dim=head_dim,
        key_groups=key_groups,
        state_dim=state_dim,
        taps=taps,
        input=LinearGroup(source.name, (source,), Fold(norm) if norm else None),
        output=LinearGroup(output.name, (output,)),
        norm_eps=norm_eps,
        bias=conv_bias,
        conv=f"{module}.conv1d",
        decay=f"{module}.A_log",
        skip=f"{module}.D",
        time_bias=f"{module}.dt_bias",
        norm=f"{module}.norm.weight" if normed else None,
    )


def mamba(config: PretrainedConfig, **options: Any) -> StateSpace:
    """The state space that ``mamba_n_heads`` and the settings beside it describe.

    options: further arguments of :func:`state_space`.
    """
    read.refuse(config, hidden_act="silu", time_step_limit=(0.0, float("inf")))
    hidden, heads = read.size(config, "hidden_size"), read.size(config, "mamba_n_heads")
    head_dim = read.size(config, "mamba_d_head")
    values = getattr(config, "mamba_d_ssm", None) or int(config.mamba_expand * hidden)
    if heads * head_dim != values:
        raise UnsupportedModelError(
            f"mamba_n_heads is {heads} and mamba_d_head {head_dim}, expected {values} entries "
            "together"
        )
    options.setdefault("bias", bool(config.mamba_proj_bias))
    return state_space(
        hidden,
        heads=heads,
        head_dim=head_dim,
        key_groups=read.size(config, "mamba_n_groups"),
        state_dim=read.size(config, "mamba_d_state"),
        taps=read.size(config, "mamba_d_conv"),
        norm_eps=float(config.rms_norm_eps),
        conv_bias=bool(config.mamba_conv_bias),
        **options,
    )
