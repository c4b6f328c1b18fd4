"""Whole decoder layers of the most frequent kind, for back ends that compute them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nybble.kernels.activation import Activation
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.lora import LoRASlots
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import Weight
from nybble.kernels.routing import Routing


@dataclass(frozen=True)
class RmsNorm:
    """See :func:`nybble.kernels.reference.rms_norm`."""

    weight: Tensor
    eps: float
    offset: float | None


@dataclass(frozen=True)
class GatedMlp:
    """``down(gated(gate_up(x)))``. gate_up: computes gate and up side by side."""

    gate_up: Weight
    activation: Activation
    down: Weight


@dataclass(frozen=True)
class ExpertMlps:
    """Gated MLPs of which a router chooses ``top_k`` for every token.

    router: float32 ``(experts, hidden)``; router_bias: float32 ``(experts,)``, None for none.
    routing, correction_bias: see :func:`nybble.kernels.routing.choose_experts`.
    gate_up, down: of each expert.
    shared: is computed for every token and added; None for none.
    """

    router: Tensor
    router_bias: Tensor | None
    routing: Routing
    correction_bias: Tensor | None
    top_k: int
    gate_up: Sequence[Weight]
    activation: Activation
    down: Sequence[Weight]
    shared: GatedMlp | None


@dataclass(frozen=True)
class DecoderLayer:
    """Attention, then an MLP; each reads the normed residual stream and is added to it.

    attention_norm, mlp_norm: of what each reads.
    post_attention_norm, post_mlp_norm: of what each adds; None for none.
    qkv: computes queries, keys and values side by side.
    q_norm, k_norm: of each head by itself, before it is rotated; None for none.
    scale, window, softcap, sinks: see :func:`nybble.kernels.reference.paged_attention`.
    interleaved: see :func:`nybble.kernels.reference.rotary_store`.
    """

    attention_norm: RmsNorm
    qkv: Weight
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    output: Weight
    post_attention_norm: RmsNorm | None
    mlp_norm: RmsNorm
    mlp: GatedMlp | ExpertMlps
    post_mlp_norm: RmsNorm | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None
    interleaved: bool

    @property
    def dense_mlp(self) -> GatedMlp | None:
        """The MLP that every token passes, if there is one."""
        return self.mlp if isinstance(self.mlp, GatedMlp) else self.mlp.shared

    @property
    def dense_weights(self) -> tuple[Weight, ...]:
        """Those that every token passes, in the order of computation."""
        own = () if (mlp := self.dense_mlp) is None else (mlp.gate_up, mlp.down)
        return self.qkv, self.output, *own


class DecoderLayersKernel(Protocol):
    """Computes layers one after another, as the operations of its back end would one by one."""

    def __call__(
        self,
        added: Tensor | None,
        residual: Tensor,
        rotary: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[tuple[Tensor, ...]],
        batches: Sequence[AttentionBatch],
        adapters: Sequence[LoRASlots] = (),
        lora: LoRABatch | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """What the last layer's MLP adds, and the residual before it is added.

        added: is added to ``residual`` first, ``(tokens, hidden)`` both; None for nothing.
        rotary: of each layer cos and sin.
        adapters: of each layer those on qkv, output, gate_up and down, if no layer is a mixture;
            lora: which rows use them, None if none does.
        caches: of each layer keys and values, and the scales of both if they have any.
        Returns None if the kernel does not take these caches.
        """
        ...
