"""The parts a decoder is composed of: norms, projections, attention, MLP, and residual blocks.

Each is made for one back end, and holds its weights and its settings from the
:class:`nybble.models.Architecture`. It computes hidden states ``(tokens, hidden)`` of a whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nybble.engine.parallel import TensorParallel
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.backend import Backend
from nybble.kernels.decoder_layer import DecoderLayersKernel
from nybble.kernels.packed import GroupedKernel, LinearKernel, Weight
from nybble.kernels.reference import add_layer_norm, layer_norm, rotate, weighted_sum
from nybble.kernels.state_batch import StateBatch
from nybble.models import Attention, Mixture, Norm

if TYPE_CHECKING:
    from nybble.engine.adapter_ends import StepEnds
    from nybble.engine.adapter_slots import StepAdapters

# Keys and values ``(blocks, kv_heads, block_size, head_dim)`` of a layer. If they are int8 or fp8,
# the scales of both follow: see :func:`nybble.kernels.reference.rotary_store`.
KVCache = tuple[Tensor, ...]
# What a layer without attention keeps of sequences: each tensor of its mixer's ``states`` for every
# slot, ``(slots, …)``.
States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Step:
    """What the parts read beside hidden states.

    rotary: for each kind of rotary embedding, cos and sin, each ``(tokens, rotary_dim)``.
    query_scales: for each kind, what rotated queries are multiplied by ``(tokens,)``, or None.
    caches, batches: of each layer with attention.
    adapters: None if no row uses one.
    states: of each layer without attention.
    state_batch: what these layers read and write; None if there are none.
    """

    rotary: Sequence[tuple[Tensor, Tensor]]
    query_scales: Sequence[Tensor | None]
    caches: Sequence[KVCache]
    batches: Sequence[AttentionBatch]
    adapters: StepAdapters | None
    states: Sequence[States] = ()
    state_batch: StateBatch | None = None

    @property
    def ends(self) -> StepEnds | None:
        """What the adapters change at the ends and of the norms; None if nothing."""
        return None if self.adapters is None else self.adapters.ends


class Part(Protocol):
    """Computes what is added to the residual stream."""

    def __call__(self, x: Tensor, step: Step) -> Tensor: ...


class NormPart(Protocol):
    """Norms the last dimension of ``x``; :meth:`add` also adds ``x`` to the residual before.

    name: the absolute name of its module, by which adapters know it; empty if they do not.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class RmsNormPart:
    weight: Tensor
    eps: float
    offset: float | None
    backend: Backend
    name: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        return self.backend.rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.backend.add_rms_norm(x, residual, self.weight, self.eps, self.offset)


@dataclass(frozen=True)
class LayerNormPart:
    weight: Tensor
    bias: Tensor | None
    eps: float
    name: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class AllHeadsNormPart:
    """A norm of all heads together, of which this rank has some.

    whole: norms all of them. first, last: which of its outputs are this rank's.
    copies: how many ranks have the same heads.
    """

    whole: NormPart
    group: TensorParallel
    first: int
    last: int
    copies: int
    name: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        ranks = self.group.gather(x).view(len(x), self.group.size, -1)
        normed = self.whole(ranks[:, :: self.copies].flatten(1))
        return normed[:, self.first : self.last].contiguous()

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return self(residual), residual


def norm_part(
    norm: Norm, weight: Tensor, bias: Tensor | None, backend: Backend, name: str = ""
) -> NormPart:
    """The part that computes ``norm``."""
    if norm.kind == "rms":
        return RmsNormPart(weight, norm.eps, norm.offset, backend, name)
    return LayerNormPart(weight + norm.offset if norm.offset else weight, bias, norm.eps, name)


def renorm(
    norm: NormPart,
    out: Tensor,
    x: Tensor,
    ends: StepEnds | None,
    compute: Callable[[Tensor, NormPart], Tensor] = lambda x, norm: norm(x),
) -> Tensor:
    """``out``, which ``norm`` has computed of ``x``, with the rows whose adapters have another."""
    if ends is not None:
        for rows, own in ends.norms(norm.name):
            out[rows] = compute(x[rows], own)
    return out


@dataclass(frozen=True)
class Projection:
    """Linear layers that read the same input, their outputs side by side, and adapters on them.

    index: its place among the model's projections, by which adapters know it.
    multiplier: of the outputs, float32 ``(out,)`` if it is not the same for all; None for 1.
    """

    linears: tuple[LinearKernel, ...]
    index: int
    multiplier: float | Tensor | None = None

    def __call__(self, x: Tensor, adapters: StepAdapters | None) -> Tensor:
        if len(self.linears) == 1:
            out = self.linears[0](x)
        else:
            out = torch.cat([linear(x) for linear in self.linears], dim=-1)
        if adapters is not None:
            adapters.add(self.index, out, x)
        if self.multiplier is not None:
            out = (out * self.multiplier).to(out.dtype)
        return out


@dataclass(frozen=True)
class AttentionPart:
    """Attention of one layer.

    sinks: float32 ``(heads,)``, or None.
    layer: index of the KV cache and of the metadata that it uses, among layers with attention.
    rope: index of the step's rotary embedding it uses.
    output: the projection of all heads' values, with the adapters on it.
    """

    about: Attention
    sinks: Tensor | None
    layer: int
    rope: int
    qkv: Projection
    q_norm: NormPart | None
    k_norm: NormPart | None
    output: Callable[[Tensor, StepAdapters | None], Tensor]
    backend: Backend

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        about = self.about
        qkv = self.qkv(x, step.adapters).view(x.shape[0], -1, about.head_dim)
        queries = 2 * about.heads if about.gated else about.heads
        q, k, v = qkv.split_with_sizes((queries, about.kv_heads, about.kv_heads), 1)
        gate = None
        if about.gated:
            q, gate = q[:, ::2].contiguous(), q[:, 1::2]
        cos, sin = step.rotary[self.rope]
        interleaved = about.rope is not None and about.rope.interleaved
        if about.rotate_first:
            q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
            cos, sin = step.rotary[-1]  # rotates nothing
        if self.q_norm is not None and self.k_norm is not None:
            ends = step.ends
            q, k = (
                renorm(norm, self._normed(each, norm), each, ends, self._normed)
                for norm, each in ((self.q_norm, q), (self.k_norm, k))
            )
        keys, values, *kv_scales = step.caches[self.layer]
        batch = step.batches[self.layer]
        self.backend.rotary_store(
            q,
            k,
            v,
            cos,
            sin,
            keys,
            values,
            batch.slot_mapping,
            *kv_scales,
            interleaved=interleaved,
        )
        if (scales := step.query_scales[self.rope]) is not None:
            q = q * scales[:, None, None].to(q.dtype)
        attended = self.backend.paged_attention(
            q,
            keys,
            values,
            batch,
            about.scale,
            about.window,
            *kv_scales,
            softcap=about.softcap or 0.0,
            sinks=self.sinks,
        )
        if gate is not None:
            attended = attended * gate.sigmoid().flatten(1)
        return self.output(attended, step.adapters)

    def _normed(self, heads: Tensor, norm: NormPart) -> Tensor:
        if self.about.qk_norm == "all":
            return norm(heads.flatten(1)).view(heads.shape)
        return norm(heads)


@dataclass(frozen=True)
class MlpPart:
    """``down(activate(up(x)))``.

    activate: the activation of what ``up`` computes, or its gate if the MLP is gated.
    fused_up: computes both in one kernel, for steps without adapters; None if there is no such one.
    """

    up: Projection
    activate: Callable[[Tensor], Tensor]
    down: Projection
    fused_up: LinearKernel | None = None

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        if self.fused_up is not None and step.adapters is None:
            hidden = self.fused_up(x)
        else:
            hidden = self.activate(self.up(x, step.adapters))
        return self.down(hidden, step.adapters)


@dataclass(frozen=True)
class MixturePart:
    """A mixture of experts.

    router: float32 ``(experts, hidden)``. router_bias, correction_bias: float32 ``(experts,)``, or
        None.
    up: each computes a part of what the experts' activations read, side by side.
    weights: of the experts, for each kernel of ``up`` and for ``down``; empty on a GPU, whose
        kernels have copies.
    activate: the activation of what ``up`` computes, or its gate if experts are gated.
    shared_gate: float32 ``(1, hidden)``, or None.
    """

    about: Mixture
    layer: int
    router: Tensor
    router_bias: Tensor | None
    correction_bias: Tensor | None
    up: tuple[GroupedKernel, ...]
    activate: Callable[[Tensor], Tensor]
    down: GroupedKernel
    weights: Sequence[Sequence[Weight]]
    shared: MlpPart | None
    shared_gate: Tensor | None
    backend: Backend

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        logits = self.backend.router_logits(x, self.router, self.router_bias)
        router, top_k = self.about.router, self.about.top_k
        ids, weights = self.backend.choose_experts(router, logits, top_k, self.correction_bias)
        parts = [linear(x, ids, None) for linear in self.up]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        adapters = step.adapters.on_experts(self.layer, ids) if step.adapters else None
        if adapters is None:
            out = self.down(self.activate(hidden), ids, weights)
        else:
            adapters.add_up(hidden, x)
            hidden = self.activate(hidden)
            each = self.down(hidden, ids, None)
            adapters.add_down(each, hidden)
            out = weighted_sum(each, weights)
        if self.shared is None:
            return out
        shared = self.shared(x, step)
        if self.shared_gate is not None:
            gate = self.backend.router_logits(x, self.shared_gate, None).sigmoid()
            shared = shared * gate.to(x.dtype)
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


class Block(Protocol):
    """Computes one part of the decoder, or several."""

    def __call__(self, added: Tensor | None, residual: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """What is to be added to the residual next, and the residual with what ``added`` was."""
        ...


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
        if self.pre is not None:
            x = renorm(self.pre, x, residual, step.ends)
        x = self.part(x, step)
        if self.post is not None:
            x = renorm(self.post, self.post(x), x, step.ends)
        if self.multiplier != 1:
            x = x * self.multiplier
        return x, residual


@dataclass(frozen=True)
class FusedLayers:
    """Layers one after another, in one call if adapters do no more than add to projections.

    blocks: compute the same part by part.
    ropes: of each layer, the index of the rotary embedding.
    first: the number of the first layer among those with attention; the others follow.
    projections: the indices of each layer's; None if some are mixtures, whose adapters are added
        part by part.
    """

    kernel: DecoderLayersKernel
    blocks: tuple[ResidualBlock, ...]
    ropes: tuple[int, ...]
    first: int
    projections: tuple[int, ...] | None

    def __call__(self, added: Tensor | None, residual: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        adapters, low_rank = step.adapters, None
        if adapters is not None and self.projections is not None:
            low_rank = adapters.only_low_rank(self.projections)
        if adapters is None or low_rank is not None:
            rotary = [step.rotary[rope] for rope in self.ropes]
            caches, batches = step.caches, step.batches
            if len(caches) > len(rotary):
                own = slice(self.first, self.first + len(rotary))
                caches, batches = caches[own], batches[own]
            lora = None if adapters is None else adapters.batch
            done = self.kernel(added, residual, rotary, caches, batches, low_rank or (), lora)
            if done is not None:
                return done
        for block in self.blocks:
            added, residual = block(added, residual, step)
        assert added is not None
        return added, residual
