"""The decoder: the parts that an architecture names, with a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.engine.base_layers import BaseModel
from nybble.engine.fused_layers import BuiltLayer, fused
from nybble.engine.latent_parts import Expansion, LatentAttentionPart
from nybble.engine.parallel import ALONE, AnyWeight, Named, TensorParallel
from nybble.engine.parts import (
    AllHeadsNormPart,
    AttentionPart,
    KVCache,
    MixturePart,
    MlpPart,
    NormPart,
    ParallelPart,
    Part,
    Projection,
    ResidualBlock,
    States,
    Step,
    norm_part,
    renorm,
)
from nybble.engine.recurrent_parts import (
    GatedDeltaNetPart,
    ShortConvolutionPart,
    StateSpacePart,
)
from nybble.engine.rotary import identity_table, query_scale_table, rotary_table
from nybble.engine.weight_store import WeightStore
from nybble.kernels import DenseWeight, PackedWeight, reference
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.backend import Backend, backend_for
from nybble.kernels.packed import Weight
from nybble.kernels.reference import activate, clamped_swiglu, xielu
from nybble.kernels.state_batch import StateBatch
from nybble.models import (
    Architecture,
    Attention,
    LatentAttention,
    Layer,
    LinearGroup,
    Mixer,
    Mixture,
    Mlp,
    Recurrent,
    ShortConvolution,
    StateSpace,
    UnsupportedModelError,
    Xielu,
)

if TYPE_CHECKING:
    from nybble.engine.adapter_ends import StepEnds
    from nybble.engine.adapter_slots import StepAdapters


_SCORE = "score.weight"  # transformers' name in all `…ForSequenceClassification`


class Decoder:
    """Computes hidden states and logits; holds weights and no per-sequence state.

    captures: layers whose inputs :meth:`forward` captures.
    num_tokens: one more than the highest token id that can be sampled.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Iterable[tuple[str, PackedWeight | DenseWeight | Tensor]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        num_tokens: int | None = None,
        backend: Backend | None = None,
        group: TensorParallel = ALONE,
        captures: Sequence[int] = (),
        folder: Path | None = None,
    ) -> None:
        """Consumes ``weights`` one at a time (names as in transformers' checkpoints).

        num_tokens: one more than the tokenizer's highest token id. An output layer may be padded
            with more rows, which are never sampled. None if it has no such rows.
        backend: whose kernels compute it; None for the fastest there are.
        group: which rank this is, and of how many. ``architecture`` and ``weights`` are the whole
            model's; :attr:`architecture` is then this rank's part.
        captures: layers whose inputs :meth:`forward` captures, in ascending order; as many as there
            are layers means the output of the last.
        folder: of the checkpoint, which errors name.

        Raises CheckpointError naming a weight that is missing, unexpected or of another shape, and
        UnsupportedModelError for a mixture of experts that the device has no kernel for.
        """
        self.captures = tuple(captures)
        self._group, self._whole = group, architecture
        self._whole_head: AnyWeight | None = None
        weights = group.own_weights(architecture, self._seen(weights))
        self.architecture = architecture = group.part_of(architecture)
        self.max_model_len = max_model_len
        self.backend = backend or backend_for(device, dtype)
        if architecture.has_experts and device.type != "cpu" and self.backend is reference:
            raise UnsupportedModelError(
                f"{architecture.family} models are mixtures of experts, which {device.type} "
                f"computes in float16 or bfloat16 only; the dtype is {dtype}"
            )
        self._dtype = dtype
        self.num_tokens = architecture.vocab if num_tokens is None else num_tokens
        self._weights: list[tuple[Weight, ...]] = []  # of each projection
        self._norm_tensors: dict[str, tuple[Tensor, Tensor | None]] = {}
        # Of norms of all heads together: this rank's outputs, and how many ranks have the same.
        self._among_all: dict[str, tuple[int, int, int]] = {}
        store = WeightStore(weights, architecture, device, dtype, folder)
        self.embedding = store.tensor(
            architecture.embedding + ".weight", architecture.vocab, architecture.hidden
        )
        # Rounded to the dtype, as Gemma's own code and transformers do.
        self._embedding_multiplier = float(
            torch.tensor(architecture.embedding_multiplier, dtype=dtype)
        )
        # Of each layer with attention, and of each of the others: its number among its like.
        self._numbers = count(), count()
        layers: list[BuiltLayer] = []
        for index, layer in enumerate(architecture.layers):
            blocks = tuple(self._layer(store, index, layer))
            known = sum(len(each.weights) for each in layers)
            layers.append(BuiltLayer(layer, blocks, self._weights[known:]))
        # Layers between which nothing is captured can be computed in one call.
        self._blocks = [
            list(fused(layers[first:last], self.backend, dtype))
            for first, last in pairwise((0, *captures, len(layers)))
        ]
        self.final_norm = self._norm(store, architecture.final_norm, architecture.hidden)
        first, last = group.share(architecture.vocab)
        head = store.optional_linear(architecture.head, last - first, architecture.hidden)
        if head is None and not architecture.tied:
            raise store.error(f"there is no {architecture.head}, and the embeddings are not tied")
        part_of = 0 if group.size == 1 else architecture.vocab
        self._head_weight = head or DenseWeight(self.embedding[first:last], part_of=part_of)
        own_head = self.backend.linear(self._head_weight, dtype)
        self._head = group.gathered_head(own_head, architecture.vocab)
        # Of a model that classifies sequences: (labels, hidden).
        self.score = store.optional_tensor(_SCORE, architecture.hidden)
        store.finish()
        self._rotary = [rotary_table(r, max_model_len, device) for r in architecture.ropes]
        self._query_scales = [
            query_scale_table(r, max_model_len, device) for r in architecture.ropes
        ]
        plain = architecture.plain_attentions
        if any(about.rope is None or about.rotate_first for about in plain):
            head_dim = plain[0].head_dim
            self._rotary.append(identity_table(head_dim, max_model_len, device))
            self._query_scales.append(None)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: Sequence[KVCache],
        batches: Sequence[AttentionBatch],
        adapters: StepAdapters | None = None,
        states: Sequence[States] = (),
        state_batch: StateBatch | None = None,
        captured: list[Tensor] | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``(tokens, hidden)`` after the last layer, before the final norm.

        token_ids, positions: int64 ``(tokens,)``, the scheduled tokens of all sequences in a row.
        caches, batches: one per layer with attention.
        adapters: which tokens use which adapter; None if none does.
        states: one per layer without attention; state_batch: what these read and write.
        captured: gets the inputs of the layers that are to be captured, ``(tokens, hidden)`` each.
        embedded: what the first layer reads ``(tokens, hidden)``, if not the tokens' embeddings.
        """
        step = Step(
            [(cos[positions], sin[positions]) for cos, sin in self._rotary],
            [None if table is None else table[positions] for table in self._query_scales],
            caches,
            batches,
            adapters,
            states,
            state_batch,
        )
        residual = self.embed(token_ids, step.ends) if embedded is None else embedded
        added: Tensor | None = None
        for place, blocks in enumerate(self._blocks):
            if place and captured is not None:
                captured.append(residual if added is None else residual + added)
            for block in blocks:
                added, residual = block(added, residual, step)
        return residual if added is None else residual + added

    def embed(self, token_ids: Tensor, ends: StepEnds | None = None) -> Tensor:
        """What the first layer reads of tokens, ``(tokens, hidden)``.

        ends: what the tokens' adapters change; None if nothing.
        """
        if ends is None:
            embedded = self.embedding[token_ids]
        else:  # an adapter may have tokens of its own
            embedded = self.embedding[token_ids.clamp(max=len(self.embedding) - 1)]
            ends.embed(embedded, token_ids)
        if self._embedding_multiplier != 1:
            embedded = embedded * self._embedding_multiplier
        return embedded

    def normed(self, hidden: Tensor, ends: StepEnds | None = None) -> Tensor:
        """Hidden states ``(rows, hidden)`` after the final norm.

        ends: what the rows' adapters change; None if nothing.
        """
        normed = self.final_norm(hidden)
        return normed if ends is None else renorm(self.final_norm, normed, hidden, ends)

    def logits(self, hidden: Tensor, ends: StepEnds | None = None) -> Tensor:
        """float32 ``(rows, vocab)`` for hidden states ``(rows, hidden)``; −inf if not a token's.

        ends: what the rows' adapters change; None if nothing. If one has more tokens, there are as
            many columns as it has.
        """
        return self.logits_of_normed(self.normed(hidden, ends), ends)

    def logits_of_normed(self, normed: Tensor, ends: StepEnds | None = None) -> Tensor:
        """As :meth:`logits`, for hidden states after the final norm."""
        logits = self._head(normed)
        if ends is not None:
            logits = ends.head(logits, normed)
        logits = logits.float()
        if self.architecture.logits_multiplier != 1:
            logits *= self.architecture.logits_multiplier
        if (cap := self.architecture.logits_softcap) is not None:
            logits = logits.div_(cap).tanh_().mul_(cap)
        if ends is not None:
            ends.bar_unknown(logits, self.num_tokens)
        elif self.num_tokens < self.architecture.vocab:
            logits[:, self.num_tokens :] = float("-inf")
        return logits

    def _seen(self, weights: Iterable[Named]) -> Iterator[Named]:
        """The weights; keeps the output layer of all ranks, which is where its file is mapped."""
        for name, weight in weights:
            if name == self._whole.head and self._group.size > 1 and self._group.rank == 0:
                self._whole_head = weight
            yield name, weight

    @property
    def base(self) -> BaseModel:
        """What adapters need to know of it: of all ranks the ends, of this one the projections."""
        head = self._head_weight
        if isinstance(self._whole_head, PackedWeight):
            head = self._whole_head
        elif isinstance(self._whole_head, DenseWeight):
            bias = self._whole_head.bias
            head = DenseWeight(
                self._whole_head.weight.to(self._dtype),
                None if bias is None else bias.to(self._dtype),
            )
        elif self._group.size > 1 and self._whole.tied:
            head = DenseWeight(self.embedding)
        return BaseModel(
            projections=self._weights,
            embedding=self.embedding,
            head=head,
            norm_tensors=self._norm_tensors,
            norm=self._norm_of,
            backend=self.backend,
        )

    def packed_weights(self) -> Iterator[PackedWeight]:
        """Every 4-bit weight that all tokens pass."""
        weights = [weight for group in self._weights for weight in group]
        for weight in (*weights, self._head_weight):
            if isinstance(weight, PackedWeight):
                yield weight

    def _layer(self, store: WeightStore, index: int, layer: Layer) -> Iterator[ResidualBlock]:
        def norm(name: str | None) -> NormPart | None:
            if name is None:
                return None
            module = self.architecture.module(index, name)
            return self._norm(store, module, self.architecture.hidden)

        def block(pre: str | None, parts: Sequence[Part], post: str | None = None) -> ResidualBlock:
            part = parts[0] if len(parts) == 1 else ParallelPart(tuple(parts))
            return ResidualBlock(
                norm(pre),
                self._group.gathered(part),
                norm(post),
                self.architecture.residual_multiplier,
            )

        mixers = [self._mixer(store, index, mixer) for mixer in layer.mixers]
        mlps: list[Part] = []
        if isinstance(layer.mlp, Mixture):
            mlps.append(self._mixture(store, index, layer.mlp))
        elif layer.mlp is not None:
            mlps.append(self._mlp(store, index, layer.mlp))
        if layer.parallel:
            yield block(layer.pre_attention, mixers + mlps)
            return
        if mixers:
            yield block(layer.pre_attention, mixers, layer.post_attention)
        if mlps:
            yield block(layer.pre_mlp, mlps, layer.post_mlp)

    def _mixer(self, store: WeightStore, index: int, mixer: Mixer) -> Part:
        if isinstance(mixer, Attention):
            return self._attention(store, index, mixer)
        if isinstance(mixer, LatentAttention):
            return self._latent_attention(store, index, mixer)
        return self._recurrent(store, index, mixer)

    def _attention(self, store: WeightStore, index: int, about: Attention) -> AttentionPart:
        q_norm = k_norm = None
        if about.qk_norm is not None:
            q_norm, k_norm = self._head_norms(store, index, about)
        sinks = None
        if about.sinks is not None:
            sinks = store.tensor(self.architecture.module(index, about.sinks), about.heads)
        ropes = self.architecture.ropes
        return AttentionPart(
            about,
            sinks=sinks,
            layer=next(self._numbers[0]),
            rope=len(ropes) if about.rope is None else ropes.index(about.rope),
            qkv=self._projection(store, index, about.qkv),
            q_norm=q_norm,
            k_norm=k_norm,
            output=self._group.gathering(self._projection(store, index, about.output)),
            backend=self.backend,
        )

    def _latent_attention(
        self, store: WeightStore, index: int, about: LatentAttention
    ) -> LatentAttentionPart:
        def norm(name: str) -> NormPart:
            weight = store.tensor(
                self.architecture.module(index, name) + ".weight", about.norm_size(name)
            )
            own = replace(self.architecture.norm, eps=about.norm_eps)
            return norm_part(own, weight, None, self.backend)

        source = self._projection(store, index, about.input)
        query = None if about.query is None else self._projection(store, index, about.query)
        return LatentAttentionPart(
            about,
            layer=next(self._numbers[0]),
            rope=self.architecture.ropes.index(about.rope),
            input=source,
            query_norm=None if query is None else norm(about.query_norm),
            query=query,
            latent_norm=norm(about.latent_norm),
            expand=self._expansion(store, index, about),
            output=self._projection(store, index, about.output),
            backend=self.backend,
        )

    def _expansion(self, store: WeightStore, index: int, about: LatentAttention) -> Expansion:
        (weight,) = store.group(self.architecture.module(index, ""), about.expand)
        if isinstance(weight, PackedWeight):
            # Heads' parts of it are multiplied from both sides, which no packed kernel does.
            weight = DenseWeight(weight.to_layout("rows").dequantize().to(self._dtype), weight.bias)
        self._weights.append((weight,))
        by_head = about.heads, about.key_dim + about.value_dim
        return Expansion(
            index=len(self._weights) - 1,
            key_dim=about.key_dim,
            weight=weight.weight.view(*by_head, about.latent_dim),
            bias=None if weight.bias is None else weight.bias.to(self._dtype).view(by_head),
        )

    def _recurrent(
        self, store: WeightStore, index: int, about: Recurrent
    ) -> ShortConvolutionPart | GatedDeltaNetPart | StateSpacePart:
        def tensor(name: str, *shape: int) -> Tensor:
            return store.tensor(self.architecture.module(index, name), *shape)

        def taps(name: str) -> Tensor:
            return tensor(name, about.channels, 1, about.taps)[:, 0].T.contiguous()

        layer = next(self._numbers[1])
        source, output = (self._projection(store, index, group) for group in about.groups)
        if isinstance(about, ShortConvolution):
            bias = tensor(about.conv + ".bias", about.channels) if about.bias else None
            weight = taps(about.conv + ".weight")
            return ShortConvolutionPart(layer, source, weight, bias, output, self.backend)
        if isinstance(about, StateSpace):
            norm = None
            if about.norm is not None:
                norm = tensor(about.norm, about.values).to(self._dtype)
            return StateSpacePart(
                about,
                layer=layer,
                input=source,
                conv=taps(about.conv + ".weight"),
                bias=tensor(about.conv + ".bias", about.channels) if about.bias else None,
                decay=tensor(about.decay, about.heads).exp(),
                skip=tensor(about.skip, about.heads),
                time_bias=tensor(about.time_bias, about.heads),
                norm=norm,
                output=output,
                backend=self.backend,
            )
        return GatedDeltaNetPart(
            about,
            layer=layer,
            input=source,
            conv=taps(about.conv),
            decay=tensor(about.decay, about.value_heads).exp(),
            time_bias=tensor(about.time_bias, about.value_heads),
            norm=tensor(about.norm, about.value_dim).to(self._dtype),
            output=output,
            backend=self.backend,
        )

    def _head_norms(self, store: WeightStore, index: int, own: Attention) -> list[NormPart]:
        """Of the queries and of the keys."""
        (whole,), group = self._whole.layers[index].mixers, self._group
        assert isinstance(whole, Attention)
        all_together = own.qk_norm == "all" and group.size > 1
        found = []
        for name, heads, all_heads, (first, last), copies in (
            (own.q_norm, own.heads, whole.heads, group.share(whole.heads), 1),
            (own.k_norm, own.kv_heads, whole.kv_heads, group.kv_heads(whole), group.copies(whole)),
        ):
            shape = own.norm_shape(all_heads if all_together else heads)
            module = self.architecture.module(index, name)
            if all_together:
                self._among_all[module] = first * own.head_dim, last * own.head_dim, copies
            found.append(self._norm(store, module, *shape))
        return found

    def _mlp(self, store: WeightStore, index: int, about: Mlp) -> MlpPart:
        up = self._projection(store, index, about.up)
        (*_, weights) = self._weights
        fused_up = None
        if about.gated and about.clamp is None and len(weights) == 1 and not about.up.multipliers:
            fused_up = self.backend.gated_linear(weights[0], about.activation, self._dtype)
        if fused_up is not None:
            fused_up = self._group.gathered(fused_up)
        return MlpPart(
            up=up,
            activate=self._activate(store, index, about),
            down=self._projection(store, index, about.down),
            fused_up=fused_up,
        )

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
        about = mixture.experts[0]
        up = store.experts(module(""), [expert.up for expert in mixture.experts])
        (down,) = store.experts(module(""), [expert.down for expert in mixture.experts])
        return MixturePart(
            mixture,
            layer=index,
            router=weight.float().contiguous(),
            router_bias=None if bias is None else bias.float(),
            correction_bias=correction,
            up=tuple(self.backend.grouped_linear(weights, self._dtype) for weights in up),
            activate=self._activate(store, index, about),
            down=self.backend.grouped_linear(down, self._dtype),
            weights=(*up, down) if self.embedding.device.type == "cpu" else (),
            shared=None if mixture.shared is None else self._mlp(store, index, mixture.shared),
            shared_gate=None if gate is None else gate.float().contiguous(),
            backend=self.backend,
        )

    def _activate(self, store: WeightStore, index: int, about: Mlp) -> Callable[[Tensor], Tensor]:
        function: Callable[[Tensor], Tensor]
        if about.xielu is not None:
            function = self._xielu(store, index, about.xielu)
        elif (clamp := about.clamp) is not None:
            function = partial(clamped_swiglu, alpha=clamp.alpha, limit=clamp.limit)
        else:
            function = partial(
                self.backend.gated if about.gated else activate, activation=about.activation
            )
        return self._group.gathered(function)

    def _xielu(self, store: WeightStore, index: int, about: Xielu) -> Callable[[Tensor], Tensor]:
        alpha_p, alpha_n, beta, eps = (
            store.vector(self.architecture.module(index, name), 1) for name in about.tensors
        )
        softplus = torch.nn.functional.softplus
        return partial(
            xielu,
            alpha_p=float(softplus(alpha_p)),
            alpha_n=float(beta + softplus(alpha_n)),
            beta=float(beta),
            eps=float(eps),
        )

    def _projection(self, store: WeightStore, index: int, group: LinearGroup) -> Projection:
        weights = store.group(self.architecture.module(index, ""), group)
        self._weights.append(weights)
        linears = tuple(self.backend.linear(weight, self._dtype) for weight in weights)
        multiplier: float | Tensor | None = None
        if len(group.multipliers) == 1:
            multiplier = group.multipliers[0][1]
        elif group.multipliers:
            runs, values = torch.tensor(group.multipliers, device=self.embedding.device).unbind(1)
            multiplier = values.repeat_interleave(runs.long())
        return Projection(linears, len(self._weights) - 1, multiplier)

    def _norm(self, store: WeightStore, module: str, *shape: int) -> NormPart:
        norm = self.architecture.norm
        bias = store.tensor(module + ".bias", *shape) if norm.bias else None
        weight = store.tensor(module + ".weight", *shape)
        self._norm_tensors[module] = weight, bias
        return self._norm_of(module, weight, bias)

    def _norm_of(self, module: str, weight: Tensor, bias: Tensor | None) -> NormPart:
        norm = norm_part(self.architecture.norm, weight, bias, self.backend, module)
        if module not in self._among_all:
            return norm
        return AllHeadsNormPart(norm, self._group, *self._among_all[module], name=module)
