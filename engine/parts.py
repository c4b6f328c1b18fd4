"""The parts a decoder is composed of: norms, projections, attention, MLP, and residual blocks.

Each holds its weights and its settings from the :class:`nybble.models.Architecture`, and computes
hidden states ``(tokens, hidden)`` of a whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nybble.engine.routing import choose_experts
from nybble.engine.weight_store import Weight
from nybble.kernels.grouped import ExpertWeights, grouped_matmul
from nybble.kernels.matmul import gated_linear, linear
from nybble.kernels.ops import (
    AttentionBatch,
    activate,
    add_layer_norm,
    add_rms_norm,
    gated,
    layer_norm,
    paged_attention,
    rms_norm,
    rotary_store,
)
from nybble.models import Attention, Mixture, Mlp, Norm

if TYPE_CHECKING:
    from nybble.engine.adapter_slots import StepAdapters

# Keys and values ``(blocks, kv_heads, block_size, head_dim)`` of a layer. If they are int8 or fp8,
# the scales of both follow: see :func:`nybble.kernels.reference.rotary_store`.
KVCache = tuple[Tensor, ...]


@dataclass(frozen=True)
class Step:
    """What the parts read beside hidden states.

    rotary: for each kind of rotary embedding, cos and sin ``(2, tokens, rotary_dim)``.
    caches: of each layer.
    adapters: None if no row uses one.
    """

    rotary: Sequence[Tensor]
    caches: Sequence[KVCache]
    batch: AttentionBatch
    adapters: StepAdapters | None


class Part(Protocol):
    """Computes what is added to the residual stream."""

    def __call__(self, x: Tensor, step: Step) -> Tensor: ...


class NormPart(Protocol):
    """Norms the last dimension of ``x``; :meth:`add` also adds ``x`` to the residual before."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class RmsNormPart:
    weight: Tensor
    eps: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, self.weight, self.eps, self.offset)


@dataclass(frozen=True)
class LayerNormPart:
    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


def norm_part(norm: Norm, weight: Tensor, bias: Tensor | None) -> NormPart:
    """The part that computes ``norm``."""
    if norm.kind == "rms":
        return RmsNormPart(weight, norm.eps, norm.offset)
    return LayerNormPart(weight + norm.offset if norm.offset else weight, bias, norm.eps)


@dataclass(frozen=True)
class Projection:
    """Linear layers that read the same input, their outputs side by side, and adapters on them.

    index: its place among the model's projections, by which adapters know it.
    """

    weights: tuple[Weight, ...]
    index: int

    def __call__(self, x: Tensor, adapters: StepAdapters | None) -> Tensor:
        if len(self.weights) == 1:
            out = linear(x, self.weights[0])
        else:
            out = torch.cat([linear(x, weight) for weight in self.weights], dim=-1)
        if adapters is not None:
            adapters.add(self.index, out, x)
        return out


@dataclass(frozen=True)
class AttentionPart:
    """Attention of one layer.

    layer: index of the KV cache it uses.
    rope: index of the step's rotary embedding it uses.
    """

    about: Attention
    layer: int
    rope: int
    qkv: Projection
    q_norm: NormPart | None
    k_norm: NormPart | None
    output: Projection

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        about = self.about
        qkv = self.qkv(x, step.adapters).view(x.shape[0], -1, about.head_dim)
        q, k, v = torch.split(qkv, [about.heads, about.kv_heads, about.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        cos, sin = step.rotary[self.rope]
        keys, values, *kv_scales = step.caches[self.layer]
        rotary_store(
            q,
            k,
            v,
            cos,
            sin,
            keys,
            values,
            step.batch.slot_mapping,
            *kv_scales,
            interleaved=about.rope is not None and about.rope.interleaved,
        )
        attended = paged_attention(
            q,
            keys,
            values,
            step.batch,
            about.scale,
            about.window,
            *kv_scales,
            softcap=about.softcap or 0.0,
        )
        return self.output(attended, step.adapters)

    def _normed(self, heads: Tensor, norm: NormPart) -> Tensor:
        if self.about.qk_norm == "each":
            return norm(heads)
        width = heads.shape[-1] if self.about.qk_norm == "head" else heads[0].numel()
        return norm(heads.reshape(-1, width)).view(heads.shape)


@dataclass(frozen=True)
class MlpPart:
    about: Mlp
    up: Projection
    down: Projection

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.down(self._hidden(x, step), step.adapters)

    def _hidden(self, x: Tensor, step: Step) -> Tensor:
        activation = self.about.activation
        if not self.about.gated:
            return activate(self.up(x, step.adapters), activation)
        if step.adapters is None and len(self.up.weights) == 1:
            return gated_linear(x, self.up.weights[0], activation)
        return gated(self.up(x, step.adapters), activation)


@dataclass(frozen=True)
class MixturePart:
    """A mixture of experts.

    router: float32 ``(experts, hidden)``; router_bias, correction_bias: ``(experts,)``, or None.
    up: one for all linear layers that read the input, or one for each, their outputs side by side.
    shared_gate: float32 ``(1, hidden)``, or None.
    """

    about: Mixture
    router: Tensor
    router_bias: Tensor | None
    correction_bias: Tensor | None
    up: tuple[ExpertWeights, ...]
    down: ExpertWeights
    shared: MlpPart | None
    shared_gate: Tensor | None

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        about, activation = self.about, self.about.activation
        logits = torch.nn.functional.linear(x.float(), self.router, self.router_bias)
        ids, weights = choose_experts(about.router, logits, about.top_k, self.correction_bias)
        parts = [grouped_matmul(x, each, ids) for each in self.up]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        gate = gated if about.experts[0].gated else activate
        out = grouped_matmul(gate(hidden, activation), self.down, ids, weights)
        if self.shared is None:
            return out
        shared = self.shared(x, step)
        if self.shared_gate is not None:
            gate_of_shared = torch.nn.functional.linear(x.float(), self.shared_gate).sigmoid()
            shared = shared * gate_of_shared.to(x.dtype)
        return out + shared


@dataclass(frozen=True)
class ParallelPart:
    """Attention and MLP of the same input, added together."""

    parts: tuple[Part, ...]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        first, *others = (part(x, step) for part in self.parts)
        for other in others:
            first = first + other
        return first


@dataclass(frozen=True)
class ResidualBlock:
    """``residual + multiplier · post(part(pre(residual)))``.

    The sum is left to the next block, which adds and norms in one kernel.
    """

    pre: NormPart | None
    part: Part
    post: NormPart | None
    multiplier: float

    def __call__(self, added: Tensor | None, residual: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """What this block adds, and the residual with what the block before added."""
        if added is None:
            x = residual if self.pre is None else self.pre(residual)
        elif self.pre is None:
            x = residual = residual + added
        else:
            x, residual = self.pre.add(added, residual)
        x = self.part(x, step)
        if self.post is not None:
            x = self.post(x)
        if self.multiplier != 1:
            x = x * self.multiplier
        return x, residual
