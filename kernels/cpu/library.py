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
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.build import CpuKernelsUnavailableError, build
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import PackedWeight
from torch import Tensor

logger = logging.getLogger(__name__)

_SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@cache
def library() -> CpuLibrary | None:
    """The kernels, or None (said once, with the reason) where they cannot run."""
    try:
        return CpuLibrary(ctypes.CDLL(str(build())))
    except (CpuKernelsUnavailableError, OSError) as error:
        logger.warning("CPU kernels unavailable, using slower PyTorch operations: %s", error)
        return None


class CpuLibrary:
    """See kernels/reference.py for what each function computes.

    Tensors are on the CPU. Their dtypes, shapes and strides are checked, since an address says
    nothing of them: ValueError names what the kernels would misread. What integers refer to
    (slots, blocks, rows) is not.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = c_void_p, c_int64

        def function(name: str, *arguments: type) -> Any:
            found = getattr(library, "nybble_" + name)
            found.argtypes, found.restype = arguments, None
            return found

        self._matmul = function("packed_matmul", *[pointer] * 7, *[size] * 5, c_int, c_int)
        self._dequantize = function("dequantize", *[pointer] * 6, *[size] * 5, c_int, c_int, c_int)
        self._rms_norm = function("rms_norm", *[pointer] * 4, size, size, c_float)
        self._silu_mul = function("silu_mul", pointer, pointer, size, size, c_int)
        self._rotary = function("rotary_store", *[pointer] * 8, *[size] * 8)
        self._attention = function(
            "paged_attention", *[pointer] * 7, *[size] * 7, c_float, size, c_int
        )
        self._lora_add = function("lora_add", *[pointer] * 9, *[size] * 4, c_int)

    def takes(self, weight: PackedWeight) -> bool:
        """Whether the kernels read this weight: tiled, and groups end with an octet."""
        in_octets = weight.group_size % 8 == 0 or weight.groups == 1
        return weight.layout == "cpu_tiles" and weight.is_contiguous and in_octets

    def packed_matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """On AVX-512 levels are rounded to bfloat16, which integer levels survive exactly."""
        _check("x", x, (*x.shape[:-1], weight.in_features))
        rows = x.reshape(-1, weight.in_features)
        if weight.perm is not None:
            rows = rows[:, weight.perm]
        if weight.columns % 8:
            rows = torch.nn.functional.pad(rows, (0, -weight.columns % 8))
        rows = rows.contiguous()
        out = torch.empty(rows.shape[0], weight.out_features, dtype=torch.bfloat16)
        bias = None if weight.bias is None else weight.bias.float().contiguous()
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
            _octets_per_group(weight),
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
            _octets_per_group(weight),
            _SCALE_TYPES[weight.scales.dtype],
            made == torch.bfloat16,
            torch.get_num_threads(),
        )
        return out.to(dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = _width(x.shape[-1], 16)
        _check("x", x, x.shape)
        _check("weight", weight, (width,))
        x, weight = x.contiguous(), weight.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // width
        self._rms_norm(x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), rows, width, eps)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        width = _width(x.shape[-1], 16)
        _check("x", x, x.shape)
        _check("residual", residual, x.shape)
        _check("weight", weight, (width,))
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
        )
        return out, total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        width = _width(gate_up.shape[-1], 32) // 2
        _check("gate_up", gate_up, gate_up.shape)
        gate_up = gate_up.contiguous()
        rows = gate_up.numel() // (2 * width)
        out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype)
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
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
    ) -> None:
        tokens, q_heads, dim = q.shape
        kv_heads, block_size = k_cache.shape[1:3]
        _width(dim, 32)
        _check_heads("q", q, q.shape)
        _check_heads("k", k, (tokens, kv_heads, dim))
        _check_heads("v", v, (tokens, kv_heads, dim))
        _check_caches(k_cache, v_cache, dim)
        _check("cos", cos, (tokens, dim), torch.float32)
        _check("sin", sin, (tokens, dim), torch.float32)
        _check("slot_mapping", slot_mapping, (tokens,), torch.int64)
        cos, sin, slot_mapping = cos.contiguous(), sin.contiguous(), slot_mapping.contiguous()
        self._rotary(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slot_mapping.data_ptr(),
            tokens,
            q_heads,
            kv_heads,
            dim,
            block_size,
            q.stride(0),
            k.stride(0),
            v.stride(0),
        )

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int = 0,
    ) -> Tensor:
        tokens, q_heads, dim = q.shape
        kv_heads, block_size = k_cache.shape[1:3]
        _width(dim, 32)
        if q_heads % kv_heads:
            raise ValueError(f"{q_heads} query heads cannot share {kv_heads} KV heads evenly")
        _check_heads("q", q, (batch.slot_mapping.shape[0], q_heads, dim))
        _check_caches(k_cache, v_cache, dim)
        out = torch.empty(tokens, q_heads * dim, dtype=q.dtype)
        self._attention(
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
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
        _check("x", x, (batch.slots.shape[0], a.shape[-1]))
        _check("out", out, (batch.slots.shape[0], width))
        _check("a", a, (slots, (len(offsets) - 1) * max_rank, a.shape[-1]))
        _check("b", b, (slots, offsets[-1], max_rank))
        _check("ranks", ranks, (slots,), torch.int32)
        dense = all(t.is_contiguous() for t in (out, x, a, ranks))
        if not dense or b.stride() != (width * max_rank, 1, width):
            raise ValueError("out, x, a and ranks must be contiguous, b as slot_buffers makes it")
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
            x.shape[-1],
            torch.get_num_threads(),
        )


def _octets_per_group(weight: PackedWeight) -> int:
    """Of no more than there are columns: a group's buffer is of this size."""
    return -(-min(weight.group_size, weight.columns) // 8)


def _check(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
            f"the kernels take {dtype} {tuple(shape)} on the CPU"
        )


def _width(width: int, multiple: int) -> int:
    if width % multiple:
        raise ValueError(f"the last dimension is {width}, the kernels take multiples of {multiple}")
    return width


def _check_heads(name: str, heads: Tensor, shape: Sequence[int]) -> None:
    """Rows may lie apart, the heads of one may not."""
    _check(name, heads, shape)
    _, count, dim = heads.shape
    if heads.stride(2) != 1 or (count > 1 and heads.stride(1) != dim):
        raise ValueError(f"{name}: the heads of a row must be contiguous, not {heads.stride()}")


def _check_caches(k_cache: Tensor, v_cache: Tensor, dim: int) -> None:
    shape = (*k_cache.shape[:3], dim)
    _check("k_cache", k_cache, shape)
    _check("v_cache", v_cache, shape)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous")
