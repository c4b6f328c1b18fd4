"""The compiled kernels as Python functions on bfloat16 tensors.

Called through ctypes with plain addresses: a call costs a few microseconds, and a decode step makes
hundreds.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.activation import ACTIVATIONS, Activation, check_activation
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.build import CpuKernelsUnavailableError, load
from nybble.kernels.cpu.checks import (
    CACHES,
    SCORINGS,
    caches_match,
    misread,
    out_of_memory,
    takes_cache,
    takes_choice,
)
from nybble.kernels.cpu.decoder_layers import DecoderLayers
from nybble.kernels.cpu.stored_weight import SCALE_TYPES, StoredExperts, StoredWeight, alike
from nybble.kernels.decoder_layer import DecoderLayer, ExpertMlps
from nybble.kernels.lora import GroupedLoRA, LoRASlots
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import (
    DenseWeight,
    GroupedKernel,
    LinearKernel,
    PackedWeight,
    Weight,
)
from nybble.kernels.recurrent import L2_EPS
from nybble.kernels.reference import TokenChoice, check_rotary_dim, check_sinks
from nybble.kernels.routing import Routing
from nybble.kernels.state_batch import StateBatch

logger = logging.getLogger(__name__)


@cache
def library() -> CpuLibrary | None:
    """The kernels, or None (logged once, with the reason) if they cannot run."""
    try:
        return CpuLibrary(load())
    except (CpuKernelsUnavailableError, OSError) as error:
        logger.warning("CPU kernels unavailable, using slower PyTorch operations: %s", error)
        return None


class CpuLibrary:
    """A back end (:class:`nybble.kernels.backend.Backend`) for tensors on the CPU.

    See kernels/reference.py for what each function computes. The kernels read bfloat16, unless
    stated otherwise, and widths that are multiples of their vectors; the reference computes what
    they do not take. Shapes and strides are checked, because kernels get only addresses: ValueError
    names a tensor that they would misread. Indices (slots, blocks, rows) are not checked.
    """

    def __init__(self, library: ctypes.CDLL, activation_bits: Literal[8, 16] = 16) -> None:
        """activation_bits: 8 rounds what packed weights are multiplied with to 8 bits.

        See :func:`nybble.kernels.reference.packed_matmul_int8`. Weights whose codes the CPU
        does not multiply as bytes are computed as with 16.
        """
        self._bits = activation_bits
        pointer, size = c_void_p, c_int64

        def function(name: str, *arguments: type) -> Any:
            found = getattr(library, "nybble_" + name)
            found.argtypes, found.restype = arguments, None
            return found

        def allocating(name: str, *arguments: type) -> Any:
            """A kernel that returns whether it found no memory for its buffers."""
            found = function(name, *arguments)
            found.restype = c_int
            return found

        self._matmul = allocating("packed_matmul", *[pointer] * 7, *[size] * 5, *[c_int] * 4)
        self._grouped = allocating("grouped_matmul", *[pointer] * 6, *[size] * 9, *[c_int] * 3)
        self._dequantize = allocating(
            "dequantize", *[pointer] * 6, *[size] * 5, c_int, c_int, c_int
        )
        self._rms_norm = function("rms_norm", *[pointer] * 4, size, size, c_float, c_float, c_int)
        self._gated = function("gated", pointer, pointer, size, size, c_int, c_int)
        self._rotary = function("rotary_store", *[pointer] * 11, *[size] * 9, c_int)
        self._attention = allocating(
            "paged_attention", *[pointer] * 9, *[size] * 7, c_float, size, c_float, pointer, c_int
        )
        self._convolution = function(
            "short_convolution", *[pointer] * 10, *[size] * 4, c_int, c_int
        )
        self._delta_rule = allocating(
            "gated_delta_rule", *[pointer] * 12, *[size] * 5, c_float, c_int
        )
        self._decoder_layers = allocating(
            "decoder_layers",
            *(pointer, pointer, size, *[pointer] * 3, size, size),
            *([pointer] * 4),
            *(size, c_int, c_int),
        )
        self._scan = allocating("state_space_scan", *[pointer] * 12, *[size] * 5, c_int)
        self._router = function("router_logits", *[pointer] * 4, *[size] * 3, c_int, c_int)
        self._choose = allocating(
            "choose_experts",
            *[pointer] * 4,
            *[size] * 3,
            *(c_int, c_int, c_float, c_float, size, size, c_int, c_int),
        )
        self._lora_add = allocating("lora_add", *[pointer] * 10, *[size] * 3, c_int)
        self._sample = allocating("sample_tokens", *[pointer] * 3, size, size, c_int)

    def takes(self, weight: PackedWeight) -> bool:
        """Whether the kernels read this weight: tiled, and groups end with an octet."""
        in_octets = weight.group_size % 8 == 0 or weight.groups == 1
        return weight.layout == "cpu_tiles" and weight.is_contiguous and in_octets

    def linear(self, weight: Weight, dtype: torch.dtype) -> LinearKernel:
        """The linear layer with this weight, for inputs of ``dtype``."""
        if isinstance(weight, DenseWeight):
            return partial(reference.dense_matmul, weight=weight)
        if not self.takes(weight):
            return partial(reference.packed_matmul, weight=weight)
        if dtype != torch.bfloat16:
            return partial(reference.packed_matmul, weight=weight, dequantize=self.dequantize)
        return self._bound_matmul(weight)

    def _bound_matmul(self, weight: PackedWeight) -> LinearKernel:
        """:meth:`packed_matmul` of one weight, which looks up once what is the same in every call.

        A decode step calls it a hundred times, and the cores wait meanwhile.
        """
        stored = StoredWeight(weight)
        if stored.columns % 8:
            return partial(self.packed_matmul, weight=weight)
        inputs, outputs, perm = weight.in_features, weight.out_features, stored.perm

        def linear(x: Tensor) -> Tensor:
            if x.ndim != 2 or x.shape[1] != inputs or not x.is_contiguous():
                return self.packed_matmul(x, weight)
            if perm is not None:
                x = x.index_select(1, perm)
            rows, columns = x.shape
            out = torch.empty(rows, outputs, dtype=torch.bfloat16)
            if self._matmul(
                x.data_ptr(),
                *stored.addresses,
                out.data_ptr(),
                rows,
                outputs,
                columns,
                *stored.sizes,
                self._bits,
                torch.get_num_threads(),
            ):
                raise out_of_memory("packed_matmul")
            return out

        return linear

    def grouped_linear(self, weights: Sequence[Weight], dtype: torch.dtype) -> GroupedKernel:
        """A linear layer of every expert, for inputs of ``dtype``.

        The kernel takes experts that are stored in one way: alike but for their order of columns.
        """
        packed = [w for w in weights if isinstance(w, PackedWeight) and self.takes(w)]
        if dtype == torch.bfloat16 and len(packed) == len(weights) and alike(packed):
            return partial(self._grouped_matmul, experts=StoredExperts(packed))
        experts = [self.linear(weight, dtype) for weight in weights]
        return partial(reference.grouped_matmul, experts=experts)

    def _grouped_matmul(
        self,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor | None = None,
        *,
        experts: StoredExperts,
    ) -> Tensor:
        """A row's result is the same in any batch. expert_ids are not checked."""
        first, (rows, top_k) = experts.weights[0], expert_ids.shape
        x_shapes = (rows, first.in_features), (rows, top_k, first.in_features)
        if (
            x.shape not in x_shapes
            or x.dtype != torch.bfloat16
            or expert_ids.dtype != torch.int64
            or (weights is not None and weights.shape != expert_ids.shape)
        ):
            raise misread(
                f"bfloat16 {x_shapes[0]} or {x_shapes[1]} and int64 expert_ids", x=x, ids=expert_ids
            )
        x, expert_ids = x.contiguous(), expert_ids.contiguous()
        if weights is not None:
            weights = weights.float().contiguous()
        each = (rows, top_k) if weights is None else (rows,)
        out = torch.empty(*each, first.out_features, dtype=torch.bfloat16)
        failed = self._grouped(
            x.data_ptr(),
            experts.addresses.data_ptr(),
            first.levels.data_ptr(),
            expert_ids.data_ptr(),
            None if weights is None else weights.data_ptr(),
            out.data_ptr(),
            rows,
            top_k,
            x.ndim == 3,
            len(experts.weights),
            first.in_features,
            first.out_features,
            *experts.sizes,
            self._bits,
            torch.get_num_threads(),
        )
        if failed:
            raise out_of_memory("grouped_matmul")
        return out

    def router_logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Summed in float32, in the same order for a row in any batch; in bfloat16 or float32."""
        experts, hidden = weight.shape
        if hidden % 16 or x.dtype not in (torch.bfloat16, torch.float32):
            return reference.router_logits(x, weight, bias)
        if not (
            x.shape == (len(x), hidden)
            and weight.dtype == torch.float32
            and weight.is_contiguous()
            and (bias is None or (bias.dtype == torch.float32 and bias.shape == (experts,)))
        ):
            raise misread(f"x (rows, {hidden}) and a contiguous float32 weight", x=x, weight=weight)
        x, out = x.contiguous(), torch.empty(len(x), experts)
        self._router(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.contiguous().data_ptr(),
            out.data_ptr(),
            len(x),
            hidden,
            experts,
            x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return out

    def choose_experts(
        self, router: Routing, logits: Tensor, top_k: int, correction_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A row's result is the same in any batch. Of equal experts the first is chosen.

        Sparsemixer's are the reference's.
        """
        if router.scoring not in SCORINGS:
            return reference.choose_experts(router, logits, top_k, correction_bias)
        rows, experts = logits.shape
        if not (
            logits.dtype == torch.float32
            and logits.is_contiguous()
            and takes_choice(router, experts, top_k)
            and (
                correction_bias is None
                or (correction_bias.dtype == torch.float32 and correction_bias.shape == (experts,))
            )
        ):
            raise misread("contiguous float32 logits (rows, experts)", logits=logits)
        ids = torch.empty(rows, top_k, dtype=torch.int64)
        weights = torch.empty(rows, top_k)
        if correction_bias is not None:
            correction_bias = correction_bias.contiguous()
        if self._choose(
            logits.data_ptr(),
            None if correction_bias is None else correction_bias.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            rows,
            experts,
            top_k,
            SCORINGS.index(router.scoring),
            router.renormalize,
            router.least_sum,
            router.scaling_factor,
            router.groups,
            router.topk_groups,
            router.group_score == "top2",
            torch.get_num_threads(),
        ):
            raise out_of_memory("choose_experts")
        return ids, weights

    def gated_linear(self, weight: Weight, activation: Activation, dtype: torch.dtype) -> None:
        """None: the product and :meth:`gated` are two kernels."""

    def decoder_layers(
        self, layers: Sequence[DecoderLayer], dtype: torch.dtype
    ) -> DecoderLayers | None:
        """In bfloat16, if the kernels take every weight."""
        for layer in layers:
            groups: list[Sequence[Weight]] = [[weight] for weight in layer.dense_weights]
            if isinstance(layer.mlp, ExpertMlps):
                groups += layer.mlp.gate_up, layer.mlp.down
            for group in groups:
                packed = [w for w in group if isinstance(w, PackedWeight) and self.takes(w)]
                if len(packed) < len(group) or not alike(packed):
                    return None
            if dtype != torch.bfloat16 or not DecoderLayers.take(layer):
                return None
        return DecoderLayers(self._decoder_layers, layers, self._bits)

    def packed_matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """A row's result is the same in any batch.

        On CPUs with BF16 levels are rounded to bfloat16, which is exact for integer levels; on
        others :func:`nybble.kernels.reference.packed_matmul_int16` is computed.
        """
        if x.shape[-1] != weight.in_features:
            raise misread(f"(…, {weight.in_features})", x=x)
        stored = StoredWeight(weight)
        rows = x.reshape(-1, weight.in_features)
        if stored.perm is not None:
            rows = rows[:, stored.perm]
        if stored.columns % 8:
            rows = torch.nn.functional.pad(rows, (0, -stored.columns % 8))
        rows = rows.contiguous()
        out = torch.empty(rows.shape[0], weight.out_features, dtype=torch.bfloat16)
        failed = self._matmul(
            rows.data_ptr(),
            *stored.addresses,
            out.data_ptr(),
            rows.shape[0],
            weight.out_features,
            rows.shape[1],
            *stored.sizes,
            self._bits,
            torch.get_num_threads(),
        )
        if failed:
            raise out_of_memory("packed_matmul")
        return out.view(*x.shape[:-1], weight.out_features)

    def dequantize(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """:meth:`PackedWeight.dequantize` of a weight this library takes, the same to the bit."""
        # Every other type is rounded from float32, as by the definition.
        made = dtype if dtype == torch.bfloat16 else torch.float32
        out = torch.empty(weight.out_features, weight.in_features, dtype=made)
        failed = self._dequantize(
            weight.qweight.data_ptr(),
            weight.scales.data_ptr(),
            None if weight.zeros is None else weight.zeros.data_ptr(),
            weight.levels.data_ptr(),
            None if weight.perm is None else weight.perm.data_ptr(),
            out.data_ptr(),
            weight.out_features,
            weight.in_features,
            weight.columns,
            weight.groups,
            -(-weight.group_size // 8),
            SCALE_TYPES[weight.scales.dtype],
            made == torch.bfloat16,
            torch.get_num_threads(),
        )
        if failed:
            raise out_of_memory("dequantize")
        return out.to(dtype)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float | None = None
    ) -> Tensor:
        width = x.shape[-1]
        if width % 16 or not x.dtype == weight.dtype == torch.bfloat16:
            return reference.rms_norm(x, weight, eps, offset)
        if weight.shape != (width,):
            raise misread("x (…, width), weight (width,)", x=x, weight=weight)
        x, weight = x.contiguous(), weight.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // width
        self._rms_norm(
            x.data_ptr(),
            None,
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            eps,
            offset or 0.0,
            offset is not None,
        )
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float | None = None
    ) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        if width % 16 or not x.dtype == residual.dtype == weight.dtype == torch.bfloat16:
            return reference.add_rms_norm(x, residual, weight, eps, offset)
        if weight.shape != (width,) or residual.shape != x.shape:
            expected = "x and residual (…, width), weight (width,)"
            raise misread(expected, x=x, residual=residual, weight=weight)
        x, weight = x.contiguous(), weight.contiguous()
        total = residual.clone(memory_format=torch.contiguous_format)
        out = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(),
            total.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            eps,
            offset or 0.0,
            offset is not None,
        )
        return out, total

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        if activation not in ACTIVATIONS:
            check_activation(activation)
        width = gate_up.shape[-1] // 2
        if gate_up.shape[-1] % 32 or gate_up.dtype != torch.bfloat16:
            return reference.gated(gate_up, activation)
        gate_up = gate_up.contiguous()
        rows = gate_up.numel() // (2 * width)
        out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype)
        self._gated(
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            ACTIVATIONS.index(activation),
            torch.get_num_threads(),
        )
        return out

    def rotary_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        k_scales: Tensor | None = None,
        v_scales: Tensor | None = None,
        *,
        interleaved: bool = False,
    ) -> None:
        """cos and sin are float32; caches with scales are int8."""
        kv_heads, block_size, dim = k_cache.shape[1:]
        if dim % 16 or q.dtype != torch.bfloat16 or not takes_cache(k_cache, k_scales):
            inputs = q, k, v, cos, sin, k_cache, v_cache, slot_mapping, k_scales, v_scales
            return reference.rotary_store(*inputs, interleaved=interleaved)
        tokens, q_heads = q.shape[:2]
        rotary_dim = cos.shape[-1]
        if not (
            q.shape[2] == dim
            and 0 < rotary_dim <= dim
            and rotary_dim % 2 == 0
            and k.dtype == v.dtype == torch.bfloat16
            and k.shape == v.shape == (tokens, kv_heads, dim)
            and k_cache.shape == v_cache.shape == (k_cache.shape[0], kv_heads, block_size, dim)
            and cos.shape == sin.shape == (tokens, rotary_dim)
            and slot_mapping.shape == (tokens,)
            and cos.dtype == sin.dtype == torch.float32
            and q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (dim, 1)
            and caches_match(k_cache, v_cache, k_scales, v_scales)
        ):
            check_rotary_dim(rotary_dim, dim)
            raise misread(
                "bfloat16 q, k and v (tokens, heads, dim), the heads of a row contiguous; "
                "float32 cos and sin (tokens, rotary dim); "
                f"{CACHES}",
                q=q,
                k=k,
                v=v,
                cos=cos,
                sin=sin,
                k_cache=k_cache,
                v_cache=v_cache,
                slot_mapping=slot_mapping,
            )
        cos, sin = cos.contiguous(), sin.contiguous()
        head = torch.empty(dim, dtype=q.dtype)
        self._rotary(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            None if k_scales is None else k_scales.data_ptr(),
            None if v_scales is None else v_scales.data_ptr(),
            head.data_ptr(),
            slot_mapping.data_ptr(),
            tokens,
            q_heads,
            kv_heads,
            dim,
            rotary_dim,
            block_size,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            interleaved,
        )

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int = 0,
        k_scales: Tensor | None = None,
        v_scales: Tensor | None = None,
        *,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Caches with scales are int8; sinks may have any dtype."""
        kv_heads, block_size, dim = k_cache.shape[1:]
        if dim % 16 or q.dtype != torch.bfloat16 or not takes_cache(k_cache, k_scales):
            inputs = q, k_cache, v_cache, batch, scale, window, k_scales, v_scales
            return reference.paged_attention(*inputs, softcap=softcap, sinks=sinks)
        tokens, q_heads = q.shape[:2]
        if not (
            q.shape[2] == dim
            and q_heads % kv_heads == 0
            and k_cache.shape == v_cache.shape == (k_cache.shape[0], kv_heads, block_size, dim)
            and batch.slot_mapping.shape == (tokens,)
            and q.stride()[1:] == (dim, 1)
            and caches_match(k_cache, v_cache, k_scales, v_scales)
        ):
            raise misread(
                "bfloat16 q (tokens, a multiple of the KV heads, dim), the heads of a row "
                f"contiguous; {CACHES}",
                q=q,
                k_cache=k_cache,
                v_cache=v_cache,
                slot_mapping=batch.slot_mapping,
            )
        if sinks is not None:
            check_sinks(sinks, q_heads)
        wide_sinks = None if sinks is None else sinks.float()
        out = torch.empty(tokens, q_heads * dim, dtype=q.dtype)
        failed = self._attention(
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            None if k_scales is None else k_scales.data_ptr(),
            None if v_scales is None else v_scales.data_ptr(),
            batch.query_start.data_ptr(),
            batch.context_lens.data_ptr(),
            batch.block_tables.data_ptr(),
            out.data_ptr(),
            batch.context_lens.shape[0],
            batch.block_tables.shape[1],
            q_heads,
            kv_heads,
            dim,
            block_size,
            q.stride(0),
            scale,
            window,
            softcap,
            None if wide_sinks is None else wide_sinks.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise out_of_memory("paged_attention")
        return out

    def latent_store(
        self,
        q: Tensor,
        key: Tensor,
        latents: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
        scales: Tensor | None = None,
        *,
        interleaved: bool = False,
    ) -> None:
        options = {"interleaved": interleaved}
        reference.latent_store(q, key, latents, cos, sin, cache, slot_mapping, scales, **options)

    def latent_attention(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        latent_dim: int,
        scales: Tensor | None = None,
    ) -> Tensor:
        # The values are the keys; of their sums the rotated entries mean nothing.
        out = self.paged_attention(q, cache, cache, batch, scale, 0, scales, scales)
        return out.view(q.shape)[..., -latent_dim:]

    def short_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, batch: StateBatch
    ) -> Tensor:
        """In bfloat16 or float32, the same to the bit as the reference."""
        taps, channels = weight.shape
        if channels % 16 or x.dtype not in (torch.bfloat16, torch.float32):
            return reference.short_convolution(x, weight, bias, state, batch)
        if not (
            x.ndim == 2
            and x.shape[1] == channels
            and x.stride(1) == 1
            and state.shape[1:] == (taps - 1, channels)
            and state.dtype == x.dtype
            and state.is_contiguous()
            and weight.dtype == torch.float32
            and weight.is_contiguous()
            and (bias is None or (bias.dtype == torch.float32 and bias.shape == (channels,)))
        ):
            raise misread(
                f"x (tokens, {channels}), the channels of a row contiguous; contiguous float32 "
                f"weight (taps, channels); a contiguous state (slots, {taps - 1}, {channels}) of "
                "the dtype of x",
                x=x,
                weight=weight,
                state=state,
            )
        out = torch.empty(x.shape, dtype=x.dtype)
        self._convolution(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.contiguous().data_ptr(),
            state.data_ptr(),
            *_addresses(batch),
            out.data_ptr(),
            len(batch.read),
            channels,
            taps,
            x.stride(0),
            x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return out

    def gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        batch: StateBatch,
    ) -> Tensor:
        """A row's result is the same in any batch and however its prompt is cut into chunks."""
        (tokens, key_heads, key_dim), (value_heads, value_dim) = k.shape, v.shape[1:]
        if key_dim % 16 or value_dim % 16:
            return reference.gated_delta_rule(q, k, v, g, beta, state, batch)
        if not (
            q.shape == k.shape
            and v.shape[0] == tokens
            and value_heads % key_heads == 0
            and g.shape == beta.shape == (tokens, value_heads)
            and state.shape[1:] == (value_heads, key_dim, value_dim)
            and state.dtype == torch.float32
            and state.is_contiguous()
        ):
            raise misread(
                "q and k (tokens, key heads, key dim), v (tokens, a multiple of the key heads, "
                "value dim), g and beta (tokens, value heads), and a contiguous float32 state "
                "(slots, value heads, key dim, value dim)",
                q=q,
                k=k,
                v=v,
                g=g,
                beta=beta,
                state=state,
            )
        wide = [each.float().contiguous() for each in (q, k, v, g, beta)]
        out = torch.empty(v.shape)
        failed = self._delta_rule(
            *(each.data_ptr() for each in wide),
            state.data_ptr(),
            *_addresses(batch),
            out.data_ptr(),
            len(batch.read),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            L2_EPS,
            torch.get_num_threads(),
        )
        if failed:
            raise out_of_memory("gated_delta_rule")
        return out.to(v.dtype)

    def state_space_scan(
        self,
        x: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor,
        g: Tensor,
        state: Tensor,
        batch: StateBatch,
    ) -> Tensor:
        """A row's result is the same in any batch and however its prompt is cut into chunks."""
        (tokens, groups, state_dim), (heads, head_dim) = b.shape, x.shape[1:]
        if head_dim % 16:
            return reference.state_space_scan(x, b, c, dt, g, state, batch)
        if not (
            b.shape == c.shape
            and x.shape[0] == tokens
            and heads % groups == 0
            and dt.shape == g.shape == (tokens, heads)
            and state.shape[1:] == (heads, state_dim, head_dim)
            and state.dtype == torch.float32
            and state.is_contiguous()
        ):
            raise misread(
                "b and c (tokens, groups, state dim), x (tokens, a multiple of the groups, head "
                "dim), dt and g (tokens, heads), and a contiguous float32 state (slots, heads, "
                "state dim, head dim)",
                x=x,
                b=b,
                c=c,
                dt=dt,
                g=g,
                state=state,
            )
        wide = [each.float().contiguous() for each in (x, b, c, dt, g)]
        out = torch.empty(x.shape)
        failed = self._scan(
            *(each.data_ptr() for each in wide),
            state.data_ptr(),
            *_addresses(batch),
            out.data_ptr(),
            len(batch.read),
            groups,
            heads,
            state_dim,
            head_dim,
            torch.get_num_threads(),
        )
        if failed:
            raise out_of_memory("state_space_scan")
        return out

    def gated_rms_norm(
        self, x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float
    ) -> Tensor:
        """Computed by PyTorch."""
        return reference.gated_rms_norm(x, gate, weight, groups, eps)

    def lora_add(self, out: Tensor, x: Tensor, slots: LoRASlots, batch: LoRABatch) -> None:
        if not out.dtype == x.dtype == slots.dtype == torch.bfloat16:
            return reference.lora_add(out, x, slots, batch)
        tokens, inputs = x.shape
        if not (
            out.shape == (tokens, slots.offsets[-1])
            and batch.slots.shape == (tokens,)
            and inputs == slots.inputs
            and out.is_contiguous()
            and x.is_contiguous()
        ):
            raise misread(
                f"contiguous x (tokens, {slots.inputs}) and out (tokens, {slots.offsets[-1]})",
                x=x,
                out=out,
                slots=batch.slots,
            )
        failed = self._lora_add(
            out.data_ptr(),
            x.data_ptr(),
            *(each.data_ptr() for each in slots.table),
            batch.order.data_ptr(),
            batch.segment_starts.data_ptr(),
            batch.segment_slots.data_ptr(),
            (c_int64 * len(slots.offsets))(*slots.offsets),
            batch.segment_slots.shape[0],
            slots.parts,
            inputs,
            torch.get_num_threads(),
        )
        if failed:
            raise out_of_memory("lora_add")

    def grouped_lora(self, slots: Tensor, count: int) -> GroupedLoRA | None:
        return reference.grouped_lora(slots, count, self.lora_add)

    def sample_tokens(self, logits: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
        """logits are float32. Sums are float64, so that tokens at a border may differ."""
        rows, vocab = logits.shape
        if logits.dtype != torch.float32 or len(choices) != rows or not vocab:
            raise misread(f"float32 ({len(choices)}, a vocabulary)", logits=logits)
        logits = logits.contiguous()
        given = torch.tensor(choices, dtype=torch.float64)
        tokens = torch.empty(rows, dtype=torch.int64)
        failed = self._sample(
            logits.data_ptr(),
            given.data_ptr(),
            tokens.data_ptr(),
            rows,
            vocab,
            torch.get_num_threads(),
        )
        if failed:
            raise out_of_memory("sample_tokens")
        return tokens


def _addresses(batch: StateBatch) -> tuple[int, ...]:
    fields = batch.query_start, batch.read, batch.write, batch.snapshot, batch.snapshot_rows
    return tuple(field.data_ptr() for field in fields)
