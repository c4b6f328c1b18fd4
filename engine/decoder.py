"""The decoder: Llama, Mistral, Qwen2 and Qwen3 in one definition, their differences as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nybble.engine.rotary import longest_exact_length, rotary_table
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.matmul import gated_layout, gated_linear, linear, preferred_layout
from nybble.kernels.ops import (
    AttentionBatch,
    add_rms_norm,
    gated,
    paged_attention,
    rms_norm,
    rotary_store,
)

if TYPE_CHECKING:
    from nybble.engine.adapter_slots import LayerSlots, ProjectionSlots, StepAdapters
    from nybble.kernels.lora import LoRABatch

Weight = PackedWeight | DenseWeight

# Keys and values ``(blocks, kv_heads, block_size, head_dim)`` of a layer; where they are int8 or
# fp8, the scales of both follow: see :func:`nybble.kernels.reference.rotary_store`.
KVCache = tuple[Tensor, ...]

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class UnsupportedModelError(ValueError):
    """The model's architecture is not one the decoder computes."""


@dataclass(frozen=True)
class DecoderShape:
    """The sizes a decoder is made of. Raises :class:`UnsupportedModelError`.

    windows: for each layer, how many tokens one sees, itself included; 0 for all before it.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    max_model_len: int
    windows: tuple[int, ...]

    @property
    def window(self) -> int:
        """Tokens that one sees in any layer, itself included; 0 where a layer sees all."""
        return max(self.windows) if all(self.windows) else 0

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> DecoderShape:
        if config.model_type not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} is not supported; "
                f"supported are {', '.join(MODEL_TYPES)}"
            )
        if config.hidden_act != "silu":
            raise UnsupportedModelError(f"hidden_act {config.hidden_act!r}: only silu is supported")
        for name in _SIZES:
            size = getattr(config, name)
            if not isinstance(size, int) or size < 1:
                raise UnsupportedModelError(f"{name} is {size!r}, expected 1 or more")
        heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        return cls(
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            intermediate=int(config.intermediate_size),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            vocab=int(config.vocab_size),
            eps=float(config.rms_norm_eps),
            max_model_len=longest_exact_length(config),
            windows=_windows(config),
        )


def _windows(config: PretrainedConfig) -> tuple[int, ...]:
    """Mistral's layers all have one or none. Qwen2's and Qwen3's may differ, by what transformers
    makes of ``use_sliding_window`` and ``max_window_layers``: ``layer_types``."""
    layers = int(config.num_hidden_layers)
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise UnsupportedModelError(
                f"layer_types has {kind!r}; supported are sliding_attention and full_attention"
            )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's weights. Projections that share an input are one weight where they could be."""

    input_norm: Tensor
    qkv: tuple[Weight, ...]
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Weight
    post_norm: Tensor
    gate_up: tuple[Weight, ...]
    down_proj: Weight


class Decoder:
    """Computes hidden states and logits; holds weights and no per-sequence state."""

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Iterable[tuple[str, PackedWeight | DenseWeight | Tensor]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        """Consumes ``weights`` one at a time (names as in transformers' checkpoints)."""
        self.shape = DecoderShape.from_config(config)
        store = _WeightStore(weights, device, dtype)
        hidden, vocab = self.shape.hidden, self.shape.vocab
        self.embedding = store.tensor("model.embed_tokens.weight", vocab, hidden)
        self.layers = [
            _layer(store, f"model.layers.{i}.", self.shape) for i in range(self.shape.layers)
        ]
        self.norm = store.tensor("model.norm.weight", hidden)
        head = store.optional_linear("lm_head", vocab, hidden)
        if head is None and not config.tie_word_embeddings:
            raise ValueError("the checkpoint has no lm_head and its embeddings are not tied")
        self.head = head or DenseWeight(self.embedding)
        store.finish()
        self.max_model_len = max_model_len
        self._rotary = rotary_table(config, max_model_len, device)

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
        adapters: which tokens use which adapter; None where none does.
        """
        shape = self.shape
        cos, sin = self._rotary[:, positions]
        residual = self.embedding[token_ids]
        x = rms_norm(residual, self.layers[0].input_norm, shape.eps)
        lora = adapters.batch if adapters else None
        for index, layer in enumerate(self.layers):
            slots = adapters.layers[index] if adapters else None
            window = shape.windows[index]
            x = self._attention(layer, x, cos, sin, caches[index], batch, window, slots, lora)
            x, residual = add_rms_norm(x, residual, layer.post_norm, shape.eps)
            if slots is None and len(layer.gate_up) == 1:
                x = gated_linear(x, layer.gate_up[0], "silu")
            else:
                x = _project(x, layer.gate_up, slots.gate_up if slots else None, lora)
                x = gated(x, "silu")
            x = _project(x, (layer.down_proj,), slots.down_proj if slots else None, lora)
            if index + 1 < len(self.layers):
                norm = self.layers[index + 1].input_norm
                x, residual = add_rms_norm(x, residual, norm, shape.eps)
        return x + residual

    def packed_weights(self) -> Iterator[PackedWeight]:
        """Every 4-bit weight of the model."""
        for layer in self.layers:
            for weight in (*layer.qkv, layer.o_proj, *layer.gate_up, layer.down_proj):
                if isinstance(weight, PackedWeight):
                    yield weight
        if isinstance(self.head, PackedWeight):
            yield self.head

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``(rows, vocab)`` for hidden states ``(rows, hidden)``."""
        return linear(self.final_norm(hidden), self.head).float()

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Hidden states ``(rows, hidden)`` as the head takes them."""
        return rms_norm(hidden, self.norm, self.shape.eps)

    def _attention(
        self,
        layer: DecoderLayer,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        window: int,
        slots: LayerSlots | None,
        lora: LoRABatch | None,
    ) -> Tensor:
        shape = self.shape
        tokens = x.shape[0]
        qkv = _project(x, layer.qkv, slots.qkv if slots else None, lora).view(
            tokens, -1, shape.head_dim
        )
        q, k, v = torch.split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q.reshape(-1, shape.head_dim), layer.q_norm, shape.eps).view(q.shape)
            k = rms_norm(k.reshape(-1, shape.head_dim), layer.k_norm, shape.eps).view(k.shape)
        keys, values, *kv_scales = cache
        rotary_store(q, k, v, cos, sin, keys, values, batch.slot_mapping, *kv_scales)
        scale = shape.head_dim**-0.5
        attended = paged_attention(q, keys, values, batch, scale, window, *kv_scales)
        return _project(attended, (layer.o_proj,), slots.o_proj if slots else None, lora)


def _project(
    x: Tensor,
    weights: tuple[Weight, ...],
    slots: ProjectionSlots | None,
    lora: LoRABatch | None,
) -> Tensor:
    if len(weights) == 1:
        out = linear(x, weights[0])
    else:
        out = torch.cat([linear(x, weight) for weight in weights], dim=-1)
    if slots is not None and lora is not None:
        slots.add(out, x, lora)
    return out


def _layer(store: _WeightStore, prefix: str, shape: DecoderShape) -> DecoderLayer:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    hidden, head_dim = shape.hidden, shape.head_dim
    qkv = store.fused(
        attention + "qkv_proj",
        [attention + p for p in ("q_proj", "k_proj", "v_proj")],
        [heads * head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)],
        hidden,
    )
    return DecoderLayer(
        input_norm=store.tensor(prefix + "input_layernorm.weight", hidden),
        qkv=qkv,
        q_norm=store.optional_tensor(attention + "q_norm.weight", head_dim),
        k_norm=store.optional_tensor(attention + "k_norm.weight", head_dim),
        o_proj=store.linear(attention + "o_proj", hidden, shape.heads * head_dim),
        post_norm=store.tensor(prefix + "post_attention_layernorm.weight", hidden),
        gate_up=store.fused(
            mlp + "gate_up_proj",
            [mlp + "gate_proj", mlp + "up_proj"],
            [shape.intermediate] * 2,
            hidden,
        ),
        down_proj=store.linear(mlp + "down_proj", hidden, shape.intermediate),
    )


class _WeightStore:
    """Weights by name, each placed on the device in its back end's layout as it arrives."""

    def __init__(
        self,
        weights: Iterable[tuple[str, PackedWeight | DenseWeight | Tensor]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        layout = preferred_layout(device)
        self._weights: dict[str, PackedWeight | DenseWeight | Tensor] = {}
        for name, weight in weights:
            if isinstance(weight, PackedWeight):
                gated = name.endswith(".gate_up_proj")
                to = gated_layout(weight, device) if gated else layout
                self._weights[name] = weight.to(device).to_layout(to)
            elif isinstance(weight, DenseWeight):
                bias = None if weight.bias is None else weight.bias.to(device, dtype)
                self._weights[name] = DenseWeight(weight.weight.to(device, dtype), bias)
            else:
                self._weights[name] = weight.to(device, dtype)

    def optional_tensor(self, name: str, *shape: int) -> Tensor | None:
        weight = self._weights.pop(name, None)
        assert weight is None or isinstance(weight, Tensor), name
        if weight is not None:
            _require_shape(name, tuple(weight.shape), shape)
        return weight

    def tensor(self, name: str, *shape: int) -> Tensor:
        weight = self.optional_tensor(name, *shape)
        if weight is None:
            raise ValueError(f"the checkpoint has no {name}")
        return weight

    def optional_linear(self, name: str, out: int, inputs: int) -> Weight | None:
        weight = self._weights.pop(name, None)
        assert not isinstance(weight, Tensor), name
        if weight is not None:
            _require_shape(name, (weight.out_features, weight.in_features), (out, inputs))
        return weight

    def linear(self, name: str, out: int, inputs: int) -> Weight:
        weight = self.optional_linear(name, out, inputs)
        if weight is None:
            raise ValueError(f"the checkpoint has no {name}")
        return weight

    def fused(
        self, name: str, parts: list[str], outs: list[int], inputs: int
    ) -> tuple[Weight, ...]:
        whole = self.optional_linear(name, sum(outs), inputs)
        if whole is not None:
            return (whole,)
        return tuple(self.linear(part, out, inputs) for part, out in zip(parts, outs, strict=True))

    def finish(self) -> None:
        """Refuse weights nobody asked for: ignoring them would change the model."""
        if self._weights:
            names = sorted(self._weights)
            raise ValueError(
                f"the checkpoint has {len(names)} weights this architecture does not use, "
                f"the first is {names[0]}"
            )


def _require_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    # The kernels go by config.json's sizes and would read beyond what is there.
    if found != expected:
        raise ValueError(f"{name} has shape {found}, expected {expected} by config.json")
