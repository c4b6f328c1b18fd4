"""What latent attention caches: one row of a rotated key and a latent, written in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.reference import check_rotary_dim
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.rotary import (
    in_8_bits,
    load_head,
    rotary_constants,
    store_head,
    turned,
)


@triton.jit
def latent_store_kernel(
    q,
    key,
    latents,
    cos,
    sin,
    cache,
    scales,
    slot_mapping,
    q_stride,
    head_stride,
    key_stride,
    latent_stride,
    heads,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    LATENT: tl.constexpr = DIM - ROTARY_DIM
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cos += token * ROTARY_DIM
    sin += token * ROTARY_DIM
    if part < tl.cdiv(heads, HEADS):
        head = part * HEADS + tl.arange(0, HEADS)
        at = q + token * q_stride + head * head_stride
        pairs = load_head(at, head < heads, ROTARY_DIM, HALF, 0, 0, INTERLEAVED)
        pairs = turned(pairs, cos, sin, ROTARY_DIM, HALF)
        store_head(at, head < heads, pairs, ROTARY_DIM, HALF, 0, 0, INTERLEAVED)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            row = slot + tl.arange(0, 1)
            one = row >= 0
            at = key + token * key_stride + tl.arange(0, 1)
            pairs = load_head(at, one, ROTARY_DIM, HALF, 0, 0, INTERLEAVED)
            pairs = turned(pairs, cos, sin, ROTARY_DIM, HALF)
            lane = tl.arange(0, REST_PADDED)[None, :]
            latent = tl.load(latents + token * latent_stride + lane, lane < LATENT, 0.0)
            whole = (pairs[0], pairs[1], latent)
            if QUANTIZED:
                whole = in_8_bits(whole, scales + row, one, cache.dtype.element_ty)
            to = cache + row * DIM
            store_head(to, one, whole, ROTARY_DIM, HALF, LATENT, REST_PADDED, INTERLEAVED)


def latent_store(
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
    """See :func:`nybble.kernels.reference.latent_store`; entries of a head must be contiguous."""
    tokens, heads, rotary_dim = q.shape
    check_rotary_dim(cos.shape[-1], rotary_dim)
    constants = rotary_constants(cache.shape[-1], rotary_dim)
    latent_store_kernel[(tokens, triton.cdiv(heads, constants["HEADS"]) + 1)](
        q,
        key,
        latents,
        cos.contiguous(),
        sin.contiguous(),
        cache,
        cache if scales is None else scales,
        slot_mapping,
        q.stride(0),
        q.stride(1),
        key.stride(0),
        latents.stride(0),
        heads,
        **constants,
        INTERLEAVED=interleaved,
        QUANTIZED=scales is not None,
        num_warps=4,
        **FUSED,
    )
