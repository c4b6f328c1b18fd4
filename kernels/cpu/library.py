"""The compiled kernels as Python functions on bfloat16 tensors.

Called through ctypes with plain addresses: a call costs a few microseconds, and a decode step makes
hundreds.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nybble.kernels.activation import ACTIVATIONS, Activation, check_activation
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.build import CpuKernelsUnavailableError, load
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import PackedWeight
from nybble.kernels.reference import TokenChoice, check_rotary_dim, check_sinks

logger = logging.getLogger(__name__)

_SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@cache
def library() -> CpuLibrary | None:
    """The kernels, or None (logged once, with the reason) if they cannot run."""
    try:
        return CpuLibrary(load())
    except (CpuKernelsUnavailableError, OSError) as error:
        logger.warning("CPU kernels unavailable, using slower PyTorch operations: %s", error)
        return None


class CpuLibrary:
    """See kernels/reference.py for what each function computes.

    Tensors are on the CPU and, unless stated otherwise, bfloat16; callers ensure this. Shapes and
    strides are checked, because kernels get only addresses: ValueError names a tensor that they
    would misread. Indices (slots, blocks, rows) are not checked.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = c_void_p, c_int64

        def function(name: str, *arguments: type) -> Any:
            found = getattr(library, "nybble_" + name)
            found.argtypes, found.restype = arguments, None
            return found

        def allocating(name: str, *arguments: type) -> Any:
            found = function(name, *arguments)
            found.restype, found.errcheck = c_int, _check_memory
            return found

        self._matmul = allocating("packed_matmul", *[pointer] * 7, *[size] * 5, c_int, c_int)
        self._dequantize = allocating(
            "dequantize", *[pointer] * 6, *[size] * 5, c_int, c_int, c_int
        )
        self._rms_norm = function("rms_norm", *[pointer] * 4, size, size, c_float, c_float)
        self._gated = function("gated", pointer, pointer, size, size, c_int, c_int)
        self._rotary = function("rotary_store", *[pointer] * 11, *[size] * 9, c_int)
        self._attention = allocating(
            "paged_attention", *[pointer] * 9, *[size] * 7, c_float, size, c_float, pointer, c_int
        )
        self._lora_add = allocating("lora_add", *[pointer] * 9, *[size] * 4, c_int)
        self._sample = allocating("sample_tokens", *[pointer] * 3, size, size, c_int)

    def takes(self, weight: PackedWeight) -> bool:
        """Whether the kernels read this weight: tiled, and groups end with an octet."""
        in_octets = weight.group_size % 8 == 0 or weight.groups == 1
        return weight.layout == "cpu_tiles" and weight.is_contiguous and in_octets

    def packed_matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """A row's result is the same in any batch.

        On CPUs with BF16 levels are rounded to bfloat16, which is exact for integer levels; on
        others :func:`nybble.kernels.reference.packed_matmul_int16` is computed.
        """
        if x.shape[-1] != weight.in_features:
            raise _misread(f"(…, {weight.in_features})", x=x)
        rows = x.reshape(-1, weight.in_features)
        if weight.perm is not None:
            rows = rows[:, weight.perm]
        if weight.columns % 8:
            rows = torch.nn.functional.pad(rows, (0, -weight.columns % 8))
        rows = rows.contiguous()
        out = torch.empty(rows.shape[0], weight.out_features, dtype=torch.bfloat16)
        bias = weight.wide_bias
        self._matmul(
            rows.data_ptr(),
            weight.qweight.data_ptr(),
            weight.scales.data_ptr(),
            None if weight.zeros is None else weight.zeros.data_ptr(),
            weight.levels.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows.shape[0],
            weight.out_features,
            rows.shape[1],
            weight.groups,
            -(-weight.group_size // 8),
            _SCALE_TYPES[weight.scales.dtype],
            torch.get_num_threads(),
        )
        return out.view(*x.shape[:-1], weight.out_features)

    def dequantize(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """:meth:`PackedWeight.dequantize` of a weight this library takes, the same to the bit."""
        # Every other type is rounded from float32, as by the definition.
        made = dtype if dtype == torch.bfloat16 else torch.float32
        out = torch.empty(weight.out_features, weight.in_features, dtype=made)
        self._dequantize(
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
            _SCALE_TYPES[weight.scales.dtype],
            made == torch.bfloat16,
            torch.get_num_threads(),
        )
        return out.to(dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        width = x.shape[-1]
        if width % 16 or weight.shape != (width,):
            raise _misread("x (…, width), weight (width,), a multiple of 16", x=x, weight=weight)
        x, weight = x.contiguous(), weight.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // width
        self._rms_norm(
            x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), rows, width, eps, offset
        )
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        if width % 16 or weight.shape != (width,) or residual.shape != x.shape:
            expected = "x and residual (…, width), weight (width,), a multiple of 16"
            raise _misread(expected, x=x, residual=residual, weight=weight)
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
            offset,
        )
        return out, total

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        check_activation(activation)
        width = gate_up.shape[-1] // 2
        if gate_up.shape[-1] % 32:
            raise _misread("(…, a multiple of 32)", gate_up=gate_up)
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
        tokens, q_heads, dim = q.shape
        rotary_dim = cos.shape[-1]
        check_rotary_dim(rotary_dim, dim)
        kv_heads, block_size = k_cache.shape[1:3]
        if not (
            dim % 16 == 0
            and k.shape == v.shape == (tokens, kv_heads, dim)
            and k_cache.shape == v_cache.shape == (k_cache.shape[0], kv_heads, block_size, dim)
            and cos.shape == sin.shape == (tokens, rotary_dim)
            and slot_mapping.shape == (tokens,)
            and cos.dtype == sin.dtype == torch.float32
            and q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (dim, 1)
            and _caches_match(k_cache, v_cache, k_scales, v_scales)
        ):
            raise _misread(
                "q, k and v (tokens, heads, a multiple of 16), the heads of a row contiguous; "
                "float32 cos and sin (tokens, rotary dim); "
                f"{_CACHES}",
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
        tokens, q_heads, dim = q.shape
        kv_heads, block_size = k_cache.shape[1:3]
        if not (
            dim % 16 == 0
            and q_heads % kv_heads == 0
            and k_cache.shape == v_cache.shape == (k_cache.shape[0], kv_heads, block_size, dim)
            and batch.slot_mapping.shape == (tokens,)
            and q.stride()[1:] == (dim, 1)
            and _caches_match(k_cache, v_cache, k_scales, v_scales)
        ):
            raise _misread(
                "q (tokens, a multiple of the KV heads, a multiple of 16), the heads of a row "
                f"contiguous; {_CACHES}",
                q=q,
                k_cache=k_cache,
                v_cache=v_cache,
                slot_mapping=batch.slot_mapping,
            )
        if sinks is not None:
            check_sinks(sinks, q_heads)
        wide_sinks = None if sinks is None else sinks.float()
        out = torch.empty(tokens, q_heads * dim, dtype=q.dtype)
        self._attention(
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
        return out

    def lora_add(
        self,
        out: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        ranks: Tensor,
        offsets: tuple[int, ...],
        batch: LoRABatch,
    ) -> None:
        """In ``b`` the outputs of one rank must be contiguous, as ``slot_buffers`` makes them."""
        slots, width, max_rank = b.shape
        tokens, inputs = x.shape
        if not (
            out.shape == (tokens, width)
            and batch.slots.shape == (tokens,)
            and offsets[-1] == width
            and a.shape == (slots, (len(offsets) - 1) * max_rank, inputs)
            and ranks.shape == (slots,)
            and ranks.dtype == torch.int32
            and b.stride() == (width * max_rank, 1, width)
            and out.is_contiguous()
            and x.is_contiguous()
            and a.is_contiguous()
            and ranks.is_contiguous()
        ):
            raise _misread(
                f"contiguous x (tokens, inputs) and out (tokens, {offsets[-1]}); a and b as "
                "slot_buffers makes them; int32 ranks (slots,)",
                x=x,
                out=out,
                a=a,
                b=b,
                ranks=ranks,
                slots=batch.slots,
            )
        self._lora_add(
            out.data_ptr(),
            x.data_ptr(),
            a.data_ptr(),
            b.data_ptr(),
            ranks.data_ptr(),
            batch.order.data_ptr(),
            batch.segment_starts.data_ptr(),
            batch.segment_slots.data_ptr(),
            (c_int64 * len(offsets))(*offsets),
            batch.segment_slots.shape[0],
            len(offsets) - 1,
            max_rank,
            inputs,
            torch.get_num_threads(),
        )

    def sample_tokens(self, logits: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
        """logits are float32. Sums are float64, so that tokens at a border may differ."""
        rows, vocab = logits.shape
        if logits.dtype != torch.float32 or len(choices) != rows or not vocab:
            raise _misread(f"float32 ({len(choices)}, a vocabulary)", logits=logits)
        logits = logits.contiguous()
        given = torch.tensor(choices, dtype=torch.float64)
        tokens = torch.empty(rows, dtype=torch.int64)
        self._sample(
            logits.data_ptr(),
            given.data_ptr(),
            tokens.data_ptr(),
            rows,
            vocab,
            torch.get_num_threads(),
        )
        return tokens


_CACHES = (
    "contiguous caches (blocks, KV heads, block size, dim), bfloat16, or int8 with contiguous "
    "float32 scales (blocks, KV heads, block size)"
)


def _caches_match(
    k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> bool:
    """Whether the caches, of the right shape, are such as _CACHES says."""
    both = k_cache, v_cache
    if k_scales is None or v_scales is None:
        return k_scales is v_scales and all(
            cache.dtype == torch.bfloat16 and cache.is_contiguous() for cache in both
        )
    return all(
        cache.dtype == torch.int8
        and scales.dtype == torch.float32
        and scales.shape == cache.shape[:3]
        and cache.is_contiguous()
        and scales.is_contiguous()
        for cache, scales in zip(both, (k_scales, v_scales), strict=True)
    )


def _check_memory(status: int, function: Any, arguments: tuple[Any, ...]) -> None:
    if status:
        raise MemoryError(f"no memory for the buffers of {function.__name__}")


def _misread(expected: str, **given: Tensor) -> ValueError:
    shown = (
        f"{name}: {t.dtype} {tuple(t.shape)} strides {t.stride()}" for name, t in given.items()
    )
    return ValueError(f"the CPU kernels take {expected}; given {', '.join(shown)}")
