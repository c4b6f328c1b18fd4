"""Rotary positions applied to q in place, and k (rotated) and v written to the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.reference import check_rotary_dim
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.overlap import follow, overlap_options

_HEADS = 8  # heads of one token that a program takes


@triton.jit
def load_head(
    x,
    heads,
    ROTARY_DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Heads that begin at ``x``: first and second elements of pairs, and the unrotated rest."""
    if INTERLEAVED:
        lane = tl.arange(0, 2 * HALF)
        mask = heads[:, None] & (lane < ROTARY_DIM)[None, :]
        pairs = tl.load(x[:, None] + lane[None, :], mask, 0.0)
        first, second = tl.split(pairs.reshape(pairs.shape[0], HALF, 2))
    else:
        lane = tl.arange(0, HALF)
        mask = heads[:, None] & (lane < ROTARY_DIM // 2)[None, :]
        first = tl.load(x[:, None] + lane[None, :], mask, 0.0)
        second = tl.load(x[:, None] + ROTARY_DIM // 2 + lane[None, :], mask, 0.0)
    parts = (first, second)  # type: tuple[object, ...]
    if REST > 0:
        lane = tl.arange(0, REST_PADDED)
        mask = heads[:, None] & (lane < REST)[None, :]
        parts += (tl.load(x[:, None] + ROTARY_DIM + lane[None, :], mask, 0.0),)
    return parts


@triton.jit
def store_head(
    x,
    heads,
    parts,
    ROTARY_DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Store what :func:`load_head` loads, or only the pairs."""
    if INTERLEAVED:
        lane = tl.arange(0, 2 * HALF)
        mask = heads[:, None] & (lane < ROTARY_DIM)[None, :]
        pairs = tl.join(parts[0], parts[1]).reshape(parts[0].shape[0], 2 * HALF)
        tl.store(x[:, None] + lane[None, :], pairs, mask)
    else:
        lane = tl.arange(0, HALF)
        mask = heads[:, None] & (lane < ROTARY_DIM // 2)[None, :]
        tl.store(x[:, None] + lane[None, :], parts[0], mask)
        tl.store(x[:, None] + ROTARY_DIM // 2 + lane[None, :], parts[1], mask)
    if len(parts) > 2:
        lane = tl.arange(0, REST_PADDED)
        mask = heads[:, None] & (lane < REST)[None, :]
        tl.store(x[:, None] + ROTARY_DIM + lane[None, :], parts[2], mask)


@triton.jit
def turned(parts, cos, sin, ROTARY_DIM: tl.constexpr, HALF: tl.constexpr):
    """The same heads with their pairs rotated."""
    first, second = parts[0], parts[1]
    lane = tl.arange(0, HALF)
    inside = lane < ROTARY_DIM // 2
    cos_first, cos_second = (
        tl.load(cos + lane, inside, 0.0)[None, :],
        tl.load(cos + ROTARY_DIM // 2 + lane, inside, 0.0)[None, :],
    )
    sin_first, sin_second = (
        tl.load(sin + lane, inside, 0.0)[None, :],
        tl.load(sin + ROTARY_DIM // 2 + lane, inside, 0.0)[None, :],
    )
    a, b = first.to(tl.float32), second.to(tl.float32)
    first = (a * cos_first - b * sin_first).to(first.dtype)
    second = (b * cos_second + a * sin_second).to(second.dtype)
    pairs = (first, second)  # type: tuple[object, ...]
    if len(parts) > 2:
        pairs += (parts[2],)
    return pairs


@triton.jit
def in_8_bits(parts, scales, heads, dtype: tl.constexpr):
    """The same heads in 8 bits; stores at ``scales`` what each was scaled by."""
    MOST: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    peak = tl.zeros([parts[0].shape[0]], tl.float32)
    for part in tl.static_range(len(parts)):
        peak = tl.maximum(peak, tl.max(tl.abs(parts[part].to(tl.float32)), 1))
    inverse = tl.where(peak > 0, MOST / peak, 0.0)[:, None]
    tl.store(scales, peak / MOST, heads)
    rounded = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(parts)):
        value = parts[part].to(tl.float32) * inverse
        if dtype == tl.int8:
            value = tl.floor(value + 0.5)
        rounded += (value.to(dtype),)
    return rounded


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
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    REST: tl.constexpr = DIM - ROTARY_DIM
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cos += token * ROTARY_DIM
    sin += token * ROTARY_DIM
    q_parts = tl.cdiv(q_heads, HEADS)
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        heads = head < q_heads
        at = q + token * q_stride + head * DIM
        pairs = load_head(at, heads, ROTARY_DIM, HALF, 0, 0, INTERLEAVED)
        pairs = turned(pairs, cos, sin, ROTARY_DIM, HALF)
        store_head(at, heads, pairs, ROTARY_DIM, HALF, 0, 0, INTERLEAVED)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            head = (part - q_parts) * HEADS + tl.arange(0, HEADS)
            heads = head < kv_heads
            row = (slot // BLOCK_SIZE * kv_heads + head) * BLOCK_SIZE + slot % BLOCK_SIZE
            at = k + token * k_stride + head * DIM
            key = load_head(at, heads, ROTARY_DIM, HALF, REST, REST_PADDED, INTERLEAVED)
            key = turned(key, cos, sin, ROTARY_DIM, HALF)
            if QUANTIZED:
                key = in_8_bits(key, k_scales + row, heads, k_cache.dtype.element_ty)
            to = k_cache + row * DIM
            store_head(to, heads, key, ROTARY_DIM, HALF, REST, REST_PADDED, INTERLEAVED)
            at = v + token * v_stride + head * DIM
            value = load_head(at, heads, ROTARY_DIM, HALF, REST, REST_PADDED, INTERLEAVED)
            if QUANTIZED:
                value = in_8_bits(value, v_scales + row, heads, v_cache.dtype.element_ty)
            to = v_cache + row * DIM
            store_head(to, heads, value, ROTARY_DIM, HALF, REST, REST_PADDED, INTERLEAVED)


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
    *,
    interleaved: bool = False,
) -> None:
    """See :func:`nybble.kernels.reference.rotary_store`. Heads of a row must be contiguous."""
    tokens, q_heads, dim = q.shape
    kv_heads, rotary_dim = k.shape[1], cos.shape[-1]
    check_rotary_dim(rotary_dim, dim)
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
        **rotary_constants(dim, rotary_dim),
        BLOCK_SIZE=k_cache.shape[2],
        INTERLEAVED=interleaved,
        QUANTIZED=k_scales is not None,
        num_warps=4,
        **overlap_options(q.device),
        **FUSED,
    )


def rotary_constants(dim: int, rotary_dim: int) -> dict[str, int]:
    """Compile-time constants of the kernel for a model's sizes."""
    return {
        "DIM": dim,
        "ROTARY_DIM": rotary_dim,
        "HEADS": _HEADS,
        "HALF": triton.next_power_of_2(rotary_dim // 2),
        "REST_PADDED": triton.next_power_of_2(max(1, dim - rotary_dim)),
    }
