"""The decoder: the parts that an architecture names, with a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.engine.parts import (
    AttentionPart,
    KVCache,
    MixturePart,
    MlpPart,
    NormPart,
    ParallelPart,
    Projection,
    ResidualBlock,
    Step,
    norm_part,
)
from nybble.engine.rotary import identity_table, rotary_table
from nybble.engine.weight_store import WeightStore
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.grouped import ExpertWeights
from nybble.kernels.matmul import linear
from nybble.kernels.ops import AttentionBatch
from nybble.models import (
    Architecture,
    Layer,
    LinearGroup,
    Mixture,
    Mlp,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from nybble.engine.adapter_slots import StepAdapters


class Decoder:
    """Computes hidden states and logits; holds weights and no per-sequence state."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Iterable[tuple[str, PackedWeight | DenseWeight | Tensor]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        num_tokens: int | None = None,
    ) -> None:
        """Consumes ``weights`` one at a time (names as in transformers' checkpoints).

        num_tokens: one more than the tokenizer's highest token id. An output layer may be padded
            with more rows, which are never sampled. None if it has no such rows.

        Raises ValueError naming a weight that is missing, unexpected or of another shape, and
        UnsupportedModelError for a mixture of experts on a GPU.
        """
        if architecture.has_experts and device.type != "cpu":
            raise UnsupportedModelError(
                f"{architecture.family} models are mixtures of experts, which run on the CPU only "
                f"so far: there is no kernel for them on {device.type}; use --device cpu"
            )
        self.architecture = architecture
        self.max_model_len = max_model_len
        self._num_tokens = architecture.vocab if num_tokens is None else num_tokens
        self._projections: list[Projection] = []
        self._experts: list[ExpertWeights] = []
        store = WeightStore(weights, architecture, device, dtype)
        self.embedding = store.tensor(
            architecture.embedding + ".weight", architecture.vocab, architecture.hidden
        )
        # Rounded to the dtype, as Gemma's own code and transformers do.
        self._embedding_multiplier = float(
            torch.tensor(architecture.embedding_multiplier, dtype=dtype)
        )
        self._blocks = [
            block
            for index, layer in enumerate(architecture.layers)
            for block in self._layer(store, index, layer)
        ]
        self.final_norm = self._norm(store, architecture.final_norm, architecture.hidden)
        head = store.optional_linear(architecture.head, architecture.vocab, architecture.hidden)
        if head is None and not architecture.tied:
            raise ValueError(
                f"the checkpoint has no {architecture.head} and its embeddings are not tied"
            )
        self.head = head or DenseWeight(self.embedding)
        store.finish()
        self._rotary = [rotary_table(r, max_model_len, device) for r in architecture.ropes]
        if any(layer.attention.rope is None for layer in architecture.layers):
            head_dim = architecture.layers[0].attention.head_dim
            self._rotary.append(identity_table(head_dim, max_model_len, device))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: Sequence[KVCache],
        batch: AttentionBatch,
        adapters: StepAdapters | None = None,
    ) -> Tensor:
        """Hidden states ``(tokens, hidden)`` after the last layer, before the final norm.

        token_ids, positions: int64 ``(tokens,)``, the scheduled tokens of all sequences in a row.
        caches: one per layer.
        adapters: which tokens use which adapter; None if none does.
        """
        step = Step([table[:, positions] for table in self._rotary], caches, batch, adapters)
        residual = self.embedding[token_ids]
        if self._embedding_multiplier != 1:
            residual = residual * self._embedding_multiplier
        added: Tensor | None = None
        for block in self._blocks:
            added, residual = block(added, residual, step)
        return residual if added is None else residual + added

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``(rows, vocab)`` for hidden states ``(rows, hidden)``; −inf if not a token's."""
        logits = linear(self.final_norm(hidden), self.head).float()
        if self.architecture.logits_multiplier != 1:
            logits *= self.architecture.logits_multiplier
        if (cap := self.architecture.logits_softcap) is not None:
            logits = logits.div_(cap).tanh_().mul_(cap)
        if self._num_tokens < self.architecture.vocab:
            logits[:, self._num_tokens :] = float("-inf")
        return logits

    def packed_weights(self) -> Iterator[PackedWeight]:
        """Every 4-bit weight of the model."""
        groups = (*self._projections, *self._experts)
        weights = [weight for each in groups for weight in each.weights]
        for weight in (*weights, self.head):
            if isinstance(weight, PackedWeight):
                yield weight

    def _layer(self, store: WeightStore, index: int, layer: Layer) -> Iterator[ResidualBlock]:
        def norm(name: str | None) -> NormPart | None:
            if name is None:
                return None
            module = self.architecture.module(index, name)
            return self._norm(store, module, self.architecture.hidden)

        attention = self._attention(store, index, layer)
        mlp: MlpPart | MixturePart
        if isinstance(layer.mlp, Mixture):
            mlp = self._mixture(store, index, layer.mlp)
        else:
            mlp = self._mlp(store, index, layer.mlp)
        multiplier = self.architecture.residual_multiplier
        pre = norm(layer.pre_attention)
        if layer.parallel:
            yield ResidualBlock(pre, ParallelPart((attention, mlp)), None, multiplier)
            return
        yield ResidualBlock(pre, attention, norm(layer.post_attention), multiplier)
        yield ResidualBlock(norm(layer.pre_mlp), mlp, norm(layer.post_mlp), multiplier)

    def _attention(self, store: WeightStore, index: int, layer: Layer) -> AttentionPart:
        about = layer.attention
        q_norm = k_norm = None
        if about.qk_norm is not None:
            module = self.architecture.module
            q_norm, k_norm = (
                self._norm(store, module(index, name), *about.norm_shape(heads))
                for name, heads in ((about.q_norm, about.heads), (about.k_norm, about.kv_heads))
            )
        ropes = self.architecture.ropes
        return AttentionPart(
            about,
            layer=index,
            rope=len(ropes) if about.rope is None else ropes.index(about.rope),
            qkv=self._projection(store, index, about.qkv),
            q_norm=q_norm,
            k_norm=k_norm,
            output=self._projection(store, index, about.output),
        )

    def _mlp(self, store: WeightStore, index: int, mlp: Mlp) -> MlpPart:
        up, down = (self._projection(store, index, group) for group in mlp.groups)
        return MlpPart(mlp, up, down)

    def _mixture(self, store: WeightStore, index: int, mixture: Mixture) -> MixturePart:
        def module(name: str) -> str:
            return self.architecture.module(index, name)

        router, experts = mixture.router, len(mixture.experts)
        weight = store.router(module(router.module), experts, self.architecture.hidden)
        bias = correction = gate = None
        if router.bias:
            bias = store.tensor(module(router.module + ".bias"), experts)
        if router.correction_bias is not None:
            correction = store.vector(module(router.correction_bias), experts)
        if mixture.shared_gate is not None:
            gate = store.router(module(mixture.shared_gate), 1, self.architecture.hidden)
        up = store.experts(module(""), [expert.up for expert in mixture.experts])
        (down,) = store.experts(module(""), [expert.down for expert in mixture.experts])
        self._experts += (*up, down)
        return MixturePart(
            mixture,
            router=weight,
            router_bias=bias,
            correction_bias=correction,
            up=up,
            down=down,
            shared=None if mixture.shared is None else self._mlp(store, index, mixture.shared),
            shared_gate=gate,
        )

    def _projection(self, store: WeightStore, index: int, group: LinearGroup) -> Projection:
        weights = store.group(self.architecture.module(index, ""), group)
        projection = Projection(weights, len(self._projections))
        self._projections.append(projection)
        return projection

    def _norm(self, store: WeightStore, module: str, *shape: int) -> NormPart:
        norm = self.architecture.norm
        bias = store.tensor(module + ".bias", *shape) if norm.bias else None
        return norm_part(norm, store.tensor(module + ".weight", *shape), bias)
