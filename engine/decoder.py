"""The decoder: Llama, Mistral, Qwen2 and Qwen3 in one definition, their differences as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from nybble.engine.rotary import longest_exact_length, rotary_table
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.matmul import linear, preferred_layout
from nybble.kernels.ops import (
    AttentionBatch,
    add_rms_norm,
    paged_attention,
    rms_norm,
    rotary_store,
    silu_mul,
)
from torch import Tensor
from transformers import PretrainedConfig

Weight = PackedWeight | DenseWeight

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class UnsupportedModelError(ValueError):
    """The model's architecture is not one the decoder computes."""


@dataclass(frozen=True)
class DecoderShape:
    """The sizes a decoder is made of. Raises :class:`UnsupportedModelError`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    max_model_len: int

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> DecoderShape:
        if config.model_type not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} is not supported; "
                f"supported are {', '.join(MODEL_TYPES)}"
            )
        if config.hidden_act != "silu":
            raise UnsupportedModelError(f"hidden_act {config.hidden_act!r}: only silu is supported")
        max_model_len = longest_exact_length(config)
        window = getattr(config, "sliding_window", None)
        if window is not None:
            # Up to the window's length, windowed and full attention are the same.
            max_model_len = min(max_model_len, int(window))
        heads = int(config.num_attention_heads)
        return cls(
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            heads=heads,
            kv_heads=int(config.num_key_value_heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            vocab=int(config.vocab_size),
            eps=float(config.rms_norm_eps),
            max_model_len=max_model_len,
        )


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
        self.embedding = store.tensor("model.embed_tokens.weight")
        self.layers = [
            _layer(store, f"model.layers.{i}.", self.shape) for i in range(self.shape.layers)
        ]
        self.norm = store.tensor("model.norm.weight")
        head = store.optional_linear("lm_head")
        if head is None and not config.tie_word_embeddings:
            raise ValueError("the checkpoint has no lm_head and its embeddings are not tied")
        self.head = head or DenseWeight(self.embedding)
        store.finish()
        self._rotary = rotary_table(config, max_model_len, device)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[tuple[Tensor, Tensor]],
        batch: AttentionBatch,
    ) -> Tensor:
        """Hidden states ``(tokens, hidden)`` after the last layer, before the final norm.

        token_ids, positions: int64 ``(tokens,)``, the scheduled tokens of all sequences in a row.
        caches: (keys, values) per layer, each ``(blocks, kv_heads, block_size, head_dim)``.
        """
        shape = self.shape
        cos, sin = self._rotary[:, positions]
        residual = self.embedding[token_ids]
        x = rms_norm(residual, self.layers[0].input_norm, shape.eps)
        for index, layer in enumerate(self.layers):
            x = self._attention(layer, x, cos, sin, caches[index], batch)
            x, residual = add_rms_norm(x, residual, layer.post_norm, shape.eps)
            x = linear(silu_mul(_project(x, layer.gate_up)), layer.down_proj)
            if index + 1 < len(self.layers):
                norm = self.layers[index + 1].input_norm
                x, residual = add_rms_norm(x, residual, norm, shape.eps)
        return x + residual

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``(rows, vocab)`` for hidden states ``(rows, hidden)``."""
        return linear(rms_norm(hidden, self.norm, self.shape.eps), self.head).float()

    def _attention(
        self,
        layer: DecoderLayer,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor],
        batch: AttentionBatch,
    ) -> Tensor:
        shape = self.shape
        tokens = x.shape[0]
        qkv = _project(x, layer.qkv).view(tokens, -1, shape.head_dim)
        q, k, v = torch.split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q.reshape(-1, shape.head_dim), layer.q_norm, shape.eps).view(q.shape)
            k = rms_norm(k.reshape(-1, shape.head_dim), layer.k_norm, shape.eps).view(k.shape)
        rotary_store(q, k, v, cos, sin, cache[0], cache[1], batch.slot_mapping)
        attended = paged_attention(q, cache[0], cache[1], batch, shape.head_dim**-0.5)
        return linear(attended, layer.o_proj)


def _project(x: Tensor, weights: tuple[Weight, ...]) -> Tensor:
    if len(weights) == 1:
        return linear(x, weights[0])
    return torch.cat([linear(x, weight) for weight in weights], dim=-1)


def _layer(store: _WeightStore, prefix: str, shape: DecoderShape) -> DecoderLayer:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    qkv = store.fused(
        attention + "qkv_proj", [attention + p for p in ("q_proj", "k_proj", "v_proj")]
    )
    expected = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    found = sum(weight.out_features for weight in qkv)
    if found != expected:
        raise ValueError(
            f"{attention}q/k/v_proj have {found} outputs together, expected {expected}"
        )
    return DecoderLayer(
        input_norm=store.tensor(prefix + "input_layernorm.weight"),
        qkv=qkv,
        q_norm=store.optional_tensor(attention + "q_norm.weight"),
        k_norm=store.optional_tensor(attention + "k_norm.weight"),
        o_proj=store.linear(attention + "o_proj"),
        post_norm=store.tensor(prefix + "post_attention_layernorm.weight"),
        gate_up=store.fused(mlp + "gate_up_proj", [mlp + "gate_proj", mlp + "up_proj"]),
        down_proj=store.linear(mlp + "down_proj"),
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
                self._weights[name] = weight.to(device).to_layout(layout)
            elif isinstance(weight, DenseWeight):
                bias = None if weight.bias is None else weight.bias.to(device, dtype)
                self._weights[name] = DenseWeight(weight.weight.to(device, dtype), bias)
            else:
                self._weights[name] = weight.to(device, dtype)

    def optional_tensor(self, name: str) -> Tensor | None:
        weight = self._weights.pop(name, None)
        assert weight is None or isinstance(weight, Tensor), name
        return weight

    def tensor(self, name: str) -> Tensor:
        weight = self.optional_tensor(name)
        if weight is None:
            raise ValueError(f"the checkpoint has no {name}")
        return weight

    def optional_linear(self, name: str) -> Weight | None:
        weight = self._weights.pop(name, None)
        assert not isinstance(weight, Tensor), name
        return weight

    def linear(self, name: str) -> Weight:
        weight = self.optional_linear(name)
        if weight is None:
            raise ValueError(f"the checkpoint has no {name}")
        return weight

    def fused(self, name: str, parts: list[str]) -> tuple[Weight, ...]:
        whole = self.optional_linear(name)
        return (whole,) if whole is not None else tuple(self.linear(part) for part in parts)

    def finish(self) -> None:
        """Refuse weights nobody asked for: ignoring them would change the model."""
        if self._weights:
            names = sorted(self._weights)
            raise ValueError(
                f"the checkpoint has {len(names)} weights this architecture does not use, "
                f"the first is {names[0]}"
            )
