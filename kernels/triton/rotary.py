"""Rotary positions applied to q in place, and k (rotated) and v written to the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.triton.device import FUSED

_HEADS = 8  # heads of one token that a program takes


@triton.jit
def _turn(x, at, cos, sin, mask, half, HALF: tl.constexpr):
    """Both halves of some heads, rotated: values at ``x + at`` and ``x + at + half``."""
    low = tl.load(x + at, mask, 0.0)
    high = tl.load(x + at + half, mask, 0.0)
    lane = tl.arange(0, HALF)
    inside = lane < half
    cos_low, cos_high = (
        tl.load(cos + lane, inside, 0.0)[None, :],
        tl.load(cos + half + lane, inside, 0.0)[None, :],
    )
    sin_low, sin_high = (
        tl.load(sin + lane, inside, 0.0)[None, :],
        tl.load(sin + half + lane, inside, 0.0)[None, :],
    )
    a, b = low.to(tl.float32), high.to(tl.float32)
    return (
        (a * cos_low - b * sin_low).to(low.dtype),
        (b * cos_high + a * sin_high).to(low.dtype),
    )


@triton.jit
def _store(cache, scales, to, row, low, high, half, mask, heads, QUANTIZED: tl.constexpr):
    """Both halves of some heads, as they are or in 8 bits with a scale for each head."""
    if QUANTIZED:
        dtype: tl.constexpr = cache.dtype.element_ty
        MOST: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
        a, b = low.to(tl.float32), high.to(tl.float32)
        peak = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
        inverse = tl.where(peak > 0, MOST / peak, 0.0)[:, None]
        tl.store(scales + row, peak / MOST, heads)
        a, b = a * inverse, b * inverse
        if dtype == tl.int8:
            a, b = tl.floor(a + 0.5), tl.floor(b + 0.5)
        tl.store(cache + to, a.to(dtype), mask)
        tl.store(cache + to + half, b.to(dtype), mask)
    else:
        tl.store(cache + to, low, mask)
        tl.store(cache + to + half, high, mask)


@triton.jit
def rotary_store_kernel(
    q,
    k,
    v,
    cos,
    sin,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    slot_mapping,
    q_stride,
    k_stride,
    v_stride,
    q_heads,
    kv_heads,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    half = DIM // 2
    lane = tl.arange(0, HALF)
    cos += token * DIM
    sin += token * DIM
    q_parts = tl.cdiv(q_heads, HEADS)
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        mask = (head < q_heads)[:, None] & (lane < half)[None, :]
        at = token * q_stride + head[:, None] * DIM + lane[None, :]
        low, high = _turn(q, at, cos, sin, mask, half, HALF)
        tl.store(q + at, low, mask)
        tl.store(q + at + half, high, mask)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            head = (part - q_parts) * HEADS + tl.arange(0, HEADS)
            mask = (head < kv_heads)[:, None] & (lane < half)[None, :]
            inner = head[:, None] * DIM + lane[None, :]
            low, high = _turn(k, token * k_stride + inner, cos, sin, mask, half, HALF)
            row = (slot // BLOCK_SIZE * kv_heads + head) * BLOCK_SIZE + slot % BLOCK_SIZE
            to = row[:, None] * DIM + lane[None, :]
            heads = head < kv_heads
            _store(k_cache, k_scales, to, row, low, high, half, mask, heads, QUANTIZED)
            at = token * v_stride + inner
            low = tl.load(v + at, mask, 0.0)
            high = tl.load(v + at + half, mask, 0.0)
            _store(v_cache, v_scales, to, row, low, high, half, mask, heads, QUANTIZED)


def rotary_store(
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
) -> None:
    """See :func:`nybble.kernels.reference.rotary_store`. Heads of a row must be contiguous."""
    tokens, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    grid = (tokens, triton.cdiv(q_heads, _HEADS) + triton.cdiv(kv_heads, _HEADS))
    rotary_store_kernel[grid](
        q,
        k,
        v,
        cos.contiguous(),
        sin.contiguous(),
        k_cache,
        v_cache,
        k_cache if k_scales is None else k_scales,
        v_cache if v_scales is None else v_scales,
        slot_mapping,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        q_heads,
        kv_heads,
        DIM=dim,
        BLOCK_SIZE=k_cache.shape[2],
        HEADS=_HEADS,
        HALF=triton.next_power_of_2(dim // 2),
        QUANTIZED=k_scales is not None,
        num_warps=4,
        **FUSED,
    )
