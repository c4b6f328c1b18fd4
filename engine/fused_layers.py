"""Which decoder layers the back end computes in one call, instead of part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from nybble.engine.parts import (
    AttentionPart,
    Block,
    FusedLayers,
    MixturePart,
    MlpPart,
    NormPart,
    Part,
    Projection,
    ResidualBlock,
    RmsNormPart,
)
from nybble.kernels.backend import Backend
from nybble.kernels.decoder_layer import (
    DecoderLayer,
    ExpertMlps,
    GatedMlp,
    RmsNorm,
)
from nybble.kernels.packed import Weight
from nybble.models import Layer, Mlp


@dataclass(frozen=True)
class BuiltLayer:
    """A layer as data, and what computes it part by part.

    weights: of each of its projections.
    """

    about: Layer
    blocks: tuple[ResidualBlock, ...]
    weights: Sequence[tuple[Weight, ...]]

    def as_decoder_layer(self) -> DecoderLayer | None:
        """None if it has other parts than such a layer, or several weights for one input."""
        first, *others = self.blocks
        if not others or any(len(each) > 1 for each in self.weights):
            return None
        if any(group.multipliers for group in self.about.groups):
            return None
        attention = first.part
        # Ranks of several gather what they compute in between: their parts are other functions.
        if not isinstance(attention, AttentionPart) or (mlp := self._mlp(others[0].part)) is None:
            return None
        about = attention.about
        if about.gated or about.rotate_first or about.qk_norm not in (None, "head"):
            return None
        if about.rope is not None and about.rope.query_beta:
            return None
        norms = [block.pre for block in self.blocks]
        optional = [attention.q_norm, attention.k_norm, *(block.post for block in self.blocks)]
        if not all(isinstance(norm, RmsNormPart) for norm in norms + [n for n in optional if n]):
            return None
        if any(block.multiplier != 1 for block in self.blocks):
            return None
        (qkv,), (output,), *_ = self.weights
        attention_norm, mlp_norm = map(_norm, norms)
        assert attention_norm is not None
        assert mlp_norm is not None
        q_norm, k_norm, post_attention_norm, post_mlp_norm = map(_norm, optional)
        return DecoderLayer(
            attention_norm=attention_norm,
            qkv=qkv,
            q_norm=q_norm,
            k_norm=k_norm,
            output=output,
            post_attention_norm=post_attention_norm,
            mlp_norm=mlp_norm,
            mlp=mlp,
            post_mlp_norm=post_mlp_norm,
            heads=about.heads,
            kv_heads=about.kv_heads,
            head_dim=about.head_dim,
            scale=about.scale,
            window=about.window,
            softcap=about.softcap or 0.0,
            sinks=attention.sinks,
            interleaved=about.rope is not None and about.rope.interleaved,
        )

    def _mlp(self, part: Part) -> GatedMlp | ExpertMlps | None:
        """None if it is of another kind."""
        about, (_, _, *weights) = self.about.mlp, self.weights
        if isinstance(about, Mlp):
            return _gated(about, weights) if isinstance(part, MlpPart) else None
        # One product for gate and up, and one for down.
        if about is None or not isinstance(part, MixturePart) or len(part.weights) != 2:
            return None
        if part.shared_gate is not None:
            return None
        shared = None if about.shared is None else _gated(about.shared, weights)
        if not _is_gated(about.experts[0]) or (about.shared is not None and shared is None):
            return None
        return ExpertMlps(
            router=part.router,
            router_bias=part.router_bias,
            routing=about.router,
            correction_bias=part.correction_bias,
            top_k=about.top_k,
            gate_up=part.weights[0],
            activation=about.activation,
            down=part.weights[1],
            shared=shared,
        )


def _is_gated(mlp: Mlp) -> bool:
    return mlp.gated and mlp.clamp is None and mlp.xielu is None


def _gated(mlp: Mlp, weights: Sequence[tuple[Weight, ...]]) -> GatedMlp | None:
    if not _is_gated(mlp):
        return None
    (gate_up,), (down,) = weights
    return GatedMlp(gate_up, mlp.activation, down)


def _norm(norm: NormPart | None) -> RmsNorm | None:
    assert norm is None or isinstance(norm, RmsNormPart)
    return None if norm is None else RmsNorm(norm.weight, norm.eps, norm.offset)


def fused(layers: Sequence[BuiltLayer], backend: Backend, dtype: torch.dtype) -> Iterator[Block]:
    """What computes ``layers`` one after another: as many as possible in one call."""

    def as_one(layer: BuiltLayer) -> DecoderLayer | None:
        about = layer.as_decoder_layer()
        taken = about is not None and backend.decoder_layers([about], dtype) is not None
        return about if taken else None

    each = [(layer, as_one(layer)) for layer in layers]
    for together, run in groupby(each, key=lambda pair: pair[1] is not None):
        built, about = zip(*run, strict=True)
        blocks = tuple(block for layer in built for block in layer.blocks)
        kernel = backend.decoder_layers(about, dtype) if together else None
        if kernel is None:
            yield from blocks
        else:
            parts = [layer.blocks[0].part for layer in built]
            ropes = tuple(part.rope for part in parts)
            projections = None
            if all(isinstance(layer.about.mlp, Mlp) for layer in built):
                projections = tuple(index for layer in built for index in _projections(layer))
            yield FusedLayers(kernel, blocks, ropes, parts[0].layer, projections)


def _projections(layer: BuiltLayer) -> Iterator[int]:
    """The indices of a decoder layer's projections, in the order of computation."""
    attention, mlp = (block.part for block in layer.blocks)
    assert isinstance(attention, AttentionPart)
    assert isinstance(attention.output, Projection)
    assert isinstance(mlp, MlpPart)
    for projection in (attention.qkv, attention.output, mlp.up, mlp.down):
        yield projection.index
