"""Whole decoder layers in one call of the C++ kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from operator import is_

import torch
from torch import Tensor

from nybble.kernels.activation import ACTIVATIONS
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.checks import (
    CACHES,
    SCORINGS,
    caches_match,
    misread,
    out_of_memory,
    takes_cache,
    takes_choice,
)
from nybble.kernels.cpu.stored_weight import StoredExperts, StoredWeight
from nybble.kernels.decoder_layer import DecoderLayer, ExpertMlps, GatedMlp, RmsNorm
from nybble.kernels.lora import LoRASlots
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import PackedWeight, Weight
from nybble.kernels.reference import check_rotary_dim, check_sinks

# kernels/cpu/decoder_layers.cpp has the same fields in the same order.


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("eps", c_float),
        ("offset", c_float),
        ("rounded_once", c_int32),
    )


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("codes", "scales", "zeros", "levels", "bias", "perm")),
        *((name, c_int64) for name in ("inputs", "outputs", "columns")),
        *((name, c_int64) for name in ("groups", "octets_per_group")),
        *((name, c_int32) for name in ("scale_type", "digits")),
    )


class _Experts(ctypes.Structure):
    _fields_ = (
        ("addresses", c_void_p),
        ("levels", c_void_p),
        *((name, c_int64) for name in ("inputs", "outputs", "columns", "groups")),
        *((name, c_int64) for name in ("octets_per_group", "scale_type")),
    )


class _Mixture(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("router", "router_bias", "correction")),
        *((name, c_int64) for name in ("count", "top_k", "groups", "topk_groups")),
        *((name, c_int32) for name in ("scoring", "renormalize", "by_two_best", "activation")),
        *((name, c_float) for name in ("least_sum", "scaling_factor")),
        *((name, _Experts) for name in ("up", "down")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("attention_norm", "q_norm", "k_norm")),
        *((name, _Norm) for name in ("post_attention_norm", "mlp_norm", "post_mlp_norm")),
        *((name, _Weight) for name in ("qkv", "output", "gate_up", "down")),
        ("mixture", _Mixture),
        ("sinks", c_void_p),
        *((name, c_int64) for name in ("heads", "kv_heads", "dim", "window")),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_int32) for name in ("interleaved", "activation")),
    )


class DecoderLayers:
    """A :class:`nybble.kernels.decoder_layer.DecoderLayersKernel`.

    A row's result is that of the kernels called one by one, to the bit.
    """

    def __init__(
        self, function: Callable[..., int], layers: Sequence[DecoderLayer], activation_bits: int
    ) -> None:
        """layers: such as :meth:`take` says, with weights that the kernels take."""
        self._function, self._given, self._bits = function, layers, activation_bits
        self._kept: list[Tensor] = []  # tensors of which the structures hold the addresses
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        self._rotary_dims: set[int] = set()  # that were checked
        self._hidden = layers[0].qkv.in_features
        self._caches: Sequence[tuple[Tensor, ...]] = ()  # of the last step
        self._of_caches: list[tuple[int, ...]] | None = None
        self._adapters: tuple[LoRASlots, ...] = ()  # of the last step that had any
        self._offsets: dict[tuple[int, ...], ctypes.Array[c_int64]] = {}
        self._of_adapters: ctypes.Array[c_int64] | None = None

    @staticmethod
    def take(layer: DecoderLayer) -> bool:
        """Whether the kernels read vectors of these widths, and norms of this dtype."""
        norms = [getattr(layer, name) for name in _NORMS]
        mlp, dense = layer.mlp, layer.dense_mlp
        return (
            layer.head_dim % 16 == 0
            and layer.qkv.in_features % 16 == 0
            and (dense is None or dense.gate_up.out_features % 32 == 0)
            and (
                isinstance(mlp, GatedMlp)
                or (
                    mlp.gate_up[0].out_features % 32 == 0
                    and mlp.routing.scoring in SCORINGS
                    and takes_choice(mlp.routing, len(mlp.router), mlp.top_k)
                )
            )
            and all(norm is None or norm.weight.dtype == torch.bfloat16 for norm in norms)
            and all(
                isinstance(w, PackedWeight) and StoredWeight(w).columns % 8 == 0
                for w in layer.dense_weights
            )
        )

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
        of_caches = self._fields_of_caches(caches)
        if of_caches is None:
            return None
        tokens = len(residual)
        for x in (residual,) if added is None else (residual, added):
            if x.shape != (tokens, self._hidden) or x.dtype != torch.bfloat16:
                raise misread(f"bfloat16 (tokens, {self._hidden})", x=x)
        # Many layers have the same.
        of_rotary: dict[int, tuple[int, ...]] = {}
        of_batch: dict[int, tuple[int, ...]] = {}
        fields: list[int] = []
        for turns, cache, batch in zip(rotary, of_caches, batches, strict=True):
            if id(turns) not in of_rotary:
                of_rotary[id(turns)] = self._rotary_fields(tokens, *turns)
            if id(batch) not in of_batch:
                of_batch[id(batch)] = _batch_fields(tokens, batch)
            fields += of_rotary[id(turns)] + cache + of_batch[id(batch)]
        if added is not None:
            added = added.contiguous()
        total = residual.clone(memory_format=torch.contiguous_format)
        out = torch.empty(tokens, self._hidden, dtype=torch.bfloat16)
        failed = self._function(
            self._layers,
            (c_int64 * len(fields))(*fields),
            len(self._layers),
            None if added is None else added.data_ptr(),
            total.data_ptr(),
            out.data_ptr(),
            tokens,
            self._hidden,
            *(_NO_ADAPTERS if lora is None else self._fields_of_adapters(tokens, adapters, lora)),
            self._bits,
            torch.get_num_threads(),
        )
        if failed:
            raise out_of_memory("decoder_layers")
        return out, total

    def _fields_of_caches(
        self, caches: Sequence[tuple[Tensor, ...]]
    ) -> list[tuple[int, ...]] | None:
        """Of each layer; None if the kernels do not take these caches. Every step has the same."""
        if len(caches) != len(self._caches) or not all(map(is_, caches, self._caches)):
            self._caches = tuple(caches)
            taken = all(
                takes_cache(keys, scales[0] if scales else None) for keys, _, *scales in caches
            )
            self._of_caches = list(map(_cache_fields, self._given, caches)) if taken else None
        return self._of_caches

    def _fields_of_adapters(
        self, tokens: int, adapters: Sequence[LoRASlots], lora: LoRABatch
    ) -> tuple[object, ...]:
        """All steps with adapters have the same slots, whatever is in them."""
        if lora.slots.shape != (tokens,):
            raise misread(f"slots ({tokens},)", slots=lora.slots)
        if len(adapters) != len(self._adapters) or not all(map(is_, adapters, self._adapters)):
            widths = [
                (w.in_features, w.out_features) for each in self._given for w in each.dense_weights
            ]
            found = [(slots.inputs, slots.offsets[-1]) for slots in adapters]
            if found != widths or any(slots.dtype != torch.bfloat16 for slots in adapters):
                raise ValueError(f"adapters in {found}, expected bfloat16 in {widths}")
            fields: list[int] = []
            for slots in adapters:
                offsets = self._offsets.setdefault(
                    slots.offsets, (c_int64 * len(slots.offsets))(*slots.offsets)
                )
                fields += [each.data_ptr() for each in slots.table]
                fields += [ctypes.addressof(offsets), slots.parts]
            self._of_adapters = (c_int64 * len(fields))(*fields)
            self._adapters = tuple(adapters)
        places = lora.order, lora.segment_starts, lora.segment_slots
        return self._of_adapters, *(each.data_ptr() for each in places), len(lora.segment_slots)

    def _layer(self, about: DecoderLayer) -> _Layer:
        sinks, mlp, dense = None, about.mlp, about.dense_mlp
        if about.sinks is not None:
            check_sinks(about.sinks, about.heads)
            sinks = self._keep(about.sinks.float())
        return _Layer(
            **{name: self._norm(getattr(about, name)) for name in _NORMS},
            qkv=self._weight(about.qkv),
            output=self._weight(about.output),
            gate_up=_Weight() if dense is None else self._weight(dense.gate_up),
            down=_Weight() if dense is None else self._weight(dense.down),
            mixture=_Mixture() if isinstance(mlp, GatedMlp) else self._mixture(mlp),
            sinks=sinks,
            heads=about.heads,
            kv_heads=about.kv_heads,
            dim=about.head_dim,
            window=about.window,
            scale=about.scale,
            softcap=about.softcap,
            interleaved=about.interleaved,
            activation=0 if dense is None else ACTIVATIONS.index(dense.activation),
        )

    def _mixture(self, about: ExpertMlps) -> _Mixture:
        routing = about.routing
        biases = about.router_bias, about.correction_bias
        return _Mixture(
            self._keep(about.router),
            *(None if bias is None else self._keep(bias) for bias in biases),
            *(len(about.router), about.top_k, routing.groups, routing.topk_groups),
            *(SCORINGS.index(routing.scoring), routing.renormalize, routing.group_score == "top2"),
            ACTIVATIONS.index(about.activation),
            *(routing.least_sum, routing.scaling_factor),
            *map(self._experts, (about.gate_up, about.down)),
        )

    def _experts(self, weights: Sequence[Weight]) -> _Experts:
        experts = StoredExperts([w for w in weights if isinstance(w, PackedWeight)])
        first = experts.weights[0]
        sizes = first.in_features, first.out_features, *experts.sizes
        return _Experts(self._keep(experts.addresses), self._keep(first.levels), *sizes)

    def _norm(self, norm: RmsNorm | None) -> _Norm:
        if norm is None:
            return _Norm()
        return _Norm(
            weight=self._keep(norm.weight),
            eps=norm.eps,
            offset=norm.offset or 0.0,
            rounded_once=norm.offset is not None,
        )

    def _weight(self, weight: Weight) -> _Weight:
        assert isinstance(weight, PackedWeight)
        stored = StoredWeight(weight)
        perm = None if stored.perm is None else self._keep(stored.perm)
        sizes = weight.in_features, weight.out_features, stored.columns
        return _Weight(*stored.addresses, perm, *sizes, *stored.sizes)

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _rotary_fields(self, tokens: int, cos: Tensor, sin: Tensor) -> tuple[int, ...]:
        dim = cos.shape[-1]
        if dim not in self._rotary_dims:  # every step has the same
            check_rotary_dim(dim, min(layer.head_dim for layer in self._given))
            self._rotary_dims.add(dim)
        if not (
            cos.shape == sin.shape == (tokens, dim)
            and cos.dtype == sin.dtype == torch.float32
            and cos.is_contiguous()
            and sin.is_contiguous()
        ):
            raise misread(f"contiguous float32 cos and sin ({tokens}, dim)", cos=cos, sin=sin)
        return cos.data_ptr(), sin.data_ptr(), dim


_NO_ADAPTERS = (None, None, None, None, 0)
# Fields of DecoderLayer and of _Layer.
_NORMS = (
    *("attention_norm", "q_norm", "k_norm"),
    *("post_attention_norm", "mlp_norm", "post_mlp_norm"),
)


def _cache_fields(layer: DecoderLayer, cache: tuple[Tensor, ...]) -> tuple[int, ...]:
    keys, values, *scales = cache
    k_scales, v_scales = scales or (None, None)
    if not (
        keys.shape == values.shape
        and keys.shape[1::2] == (layer.kv_heads, layer.head_dim)
        and caches_match(keys, values, k_scales, v_scales)
    ):
        raise misread(CACHES, k_cache=keys, v_cache=values)
    addresses = (
        0 if each is None else each.data_ptr() for each in (*cache[:2], k_scales, v_scales)
    )
    return *addresses, keys.shape[2]


def _batch_fields(tokens: int, batch: AttentionBatch) -> tuple[int, ...]:
    if batch.slot_mapping.shape != (tokens,):
        raise misread(f"slot_mapping ({tokens},)", slot_mapping=batch.slot_mapping)
    seqs, max_blocks = batch.block_tables.shape
    addresses = batch.query_start, batch.context_lens, batch.block_tables, batch.slot_mapping
    return *[each.data_ptr() for each in addresses], seqs, max_blocks
