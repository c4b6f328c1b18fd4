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


@dataclass(frozen=True)
class RmsNorm:
    """See :func:`nybble.kernels.reference.rms_norm`."""

    weight: Tensor
    eps: float
    offset: float | None


@dataclass(frozen=True)
class DecoderLayer:
    """Attention, then a gated MLP; each reads the normed residual stream and is added to it.

    attention_norm, mlp_norm: of what each reads.
    post_attention_norm, post_mlp_norm: of what each adds; None for none.
    qkv: computes queries, keys and values side by side; gate_up: gate and up.
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
    gate_up: Weight
    activation: Activation
    down: Weight
    post_mlp_norm: RmsNorm | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None
    interleaved: bool


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
        adapters: of each layer those on qkv, output, gate_up and down; lora: which rows use them,
            None if none does.
        caches: of each layer keys and values, and the scales of both if they have any.
        Returns None if the kernel does not take these caches.
        """
        ...
