"""Layers that keep states of sequences: the short convolution and the gated delta rule.

kernels/recurrent.py defines the results. One program reads and writes a part of a state, so that no
other sees it half written.

A sequence of many rows is computed in chunks: with the total decay of a chunk's rows, what each row
changes in the state follows from a triangular system of the chunk's keys, and all else is matrix
products (Yang et al. 2024, "Gated Delta Networks"; the form is that of flash-linear-attention, in
one kernel). Its products are TF32 on tensor cores, its states float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.recurrent import L2_EPS
from nybble.kernels.state_batch import StateBatch
from nybble.kernels.triton.device import FUSED

_ROWS, _CHANNELS = 16, 64  # of a tile of the convolution
VALUES = 32  # of a program of the delta rule
CHUNK = 16  # rows
PRECISION = tl.constexpr("tf32")


@triton.jit
def _row(x, state, slot, at, mask, channel, channels, stride, TAPS: tl.constexpr):
    """Rows ``at`` of a sequence; negative ones are in its state."""
    new = tl.load(x + at[:, None] * stride + channel[None, :], mask & (at >= 0)[:, None], 0.0)
    held = (slot * (TAPS - 1) + TAPS - 1 + at)[:, None] * channels + channel[None, :]
    known = mask & (tl.where(slot >= 0, at, 0) < 0)[:, None]
    return new.to(tl.float32) + tl.load(state + held, known, 0.0).to(tl.float32)


@triton.jit
def _keep(state, slot, rows, place, channel, inside, channels, TAPS: tl.constexpr):
    """Store the last rows as a state, unless the slot is −1."""
    target = (slot.to(tl.int64) * (TAPS - 1) + place)[:, None] * channels + channel[None, :]
    mask = (place < tl.where(slot >= 0, TAPS - 1, 0))[:, None] & inside[None, :]
    tl.store(state + target, rows.to(state.dtype.element_ty), mask)


@triton.jit
def convolution_kernel(
    x,
    weight,
    bias,
    state,
    out,
    query_start,
    read,
    write,
    snapshot,
    snapshot_rows,
    channels,
    stride,
    TAPS: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    seq, tile = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    first = tl.load(query_start + seq).to(tl.int64)
    rows = tl.load(query_start + seq + 1) - first
    slot = tl.load(read + seq).to(tl.int64)
    x += first * stride
    row = tile * ROWS + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & inside[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, inside, 0.0)[None, :]
    # Only the first tile's rows see the state, and only its program changes the state.
    for tap in tl.static_range(TAPS):
        at = row - (TAPS - 1) + tap
        by = tl.load(weight + tap * channels + channel, inside, 0.0)
        total += _row(x, state, slot, at, mask, channel, channels, stride, TAPS) * by[None, :]
    target = out + (first + row)[:, None] * channels + channel[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask)
    if tile == 0:
        place = tl.arange(0, PADDED)
        kept = (place < TAPS - 1)[:, None] & inside[None, :]
        reached = tl.load(snapshot_rows + seq)
        border = place - (TAPS - 1) + reached
        last = place - (TAPS - 1) + rows
        between = _row(x, state, slot, border, kept, channel, channels, stride, TAPS)
        end = _row(x, state, slot, last, kept, channel, channels, stride, TAPS)
        tl.debug_barrier()  # every thread has read the state by now
        to = tl.load(snapshot + seq)
        _keep(state, to, between, place, channel, inside, channels, TAPS)
        to = tl.load(write + seq)
        _keep(state, to, end, place, channel, inside, channels, TAPS)


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, batch: StateBatch
) -> Tensor:
    """See :func:`nybble.kernels.recurrent.short_convolution`; channels of a row are contiguous."""
    taps, channels = weight.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = min(_ROWS, triton.next_power_of_2(batch.max_query))
    grid = (len(batch.read), triton.cdiv(batch.max_query, rows), triton.cdiv(channels, _CHANNELS))
    convolution_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        state,
        out,
        batch.query_start,
        batch.read,
        batch.write,
        batch.snapshot,
        batch.snapshot_rows,
        channels,
        x.stride(0),
        TAPS=taps,
        PADDED=triton.next_power_of_2(taps - 1),
        HAS_BIAS=bias is not None,
        ROWS=rows,
        BLOCK=_CHANNELS,
        num_warps=4,
        **FUSED,
    )
    return out


@triton.jit
def stored(slot, entry, is_value, KEY_DIM: tl.constexpr):
    """Which entries of a state there are: none if the slot is −1."""
    return (entry < tl.where(slot >= 0, KEY_DIM, 0))[:, None] & is_value[None, :]


@triton.jit
def delta_rule_by_rows_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    out,
    query_start,
    read,
    write,
    snapshot,
    snapshot_rows,
    q_stride,
    k_stride,
    v_stride,
    key_heads,
    value_heads,
    scale,
    eps,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    seq, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(query_start + seq).to(tl.int64)
    stop = tl.load(query_start + seq + 1).to(tl.int64)
    if stop - first >= CHUNK:
        return
    column = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    entry = tl.arange(0, KEYS)
    is_key, is_value = entry < KEY_DIM, column < VALUE_DIM
    place = head * (KEY_DIM * VALUE_DIM) + entry[:, None] * VALUE_DIM + column[None, :]
    size = (value_heads * (KEY_DIM * VALUE_DIM)).to(tl.int64)
    slot = tl.load(read + seq)
    s = tl.load(state + slot * size + place, stored(slot, entry, is_value, KEY_DIM), 0.0)
    to, border = tl.load(snapshot + seq), first + tl.load(snapshot_rows + seq) - 1
    shared = head // (value_heads // key_heads) * KEY_DIM
    for row in range(first, stop):
        query = tl.load(q + row * q_stride + shared + entry, is_key, 0.0).to(tl.float32)
        key = tl.load(k + row * k_stride + shared + entry, is_key, 0.0).to(tl.float32)
        query *= scale / tl.sqrt(tl.sum(query * query, 0) + eps)
        key *= 1.0 / tl.sqrt(tl.sum(key * key, 0) + eps)
        values = tl.load(v + row * v_stride + head * VALUE_DIM + column, is_value, 0.0)
        decay = tl.exp(tl.load(g + row * value_heads + head))
        rate = tl.load(beta + row * value_heads + head)
        s *= decay
        delta = (values.to(tl.float32) - tl.sum(s * key[:, None], 0)) * rate
        s += key[:, None] * delta[None, :]
        value = tl.sum(s * query[:, None], 0).to(out.dtype.element_ty)
        tl.store(out + (row * value_heads + head) * VALUE_DIM + column, value, is_value)
        if row == border:
            kept = stored(to, entry, is_value, KEY_DIM)
            tl.store(state + to * size + place, s, kept)
    to = tl.load(write + seq)
    tl.store(state + to * size + place, s, stored(to, entry, is_value, KEY_DIM))


@triton.jit
def delta_rule_by_chunks_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    out,
    query_start,
    read,
    write,
    snapshot,
    snapshot_rows,
    q_stride,
    k_stride,
    v_stride,
    key_heads,
    value_heads,
    scale,
    eps,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    seq, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(query_start + seq).to(tl.int64)
    stop = tl.load(query_start + seq + 1).to(tl.int64)
    if stop - first < CHUNK:
        return
    column = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    entry = tl.arange(0, KEYS)
    is_key, is_value = entry < KEY_DIM, column < VALUE_DIM
    place = head * (KEY_DIM * VALUE_DIM) + entry[:, None] * VALUE_DIM + column[None, :]
    size = (value_heads * (KEY_DIM * VALUE_DIM)).to(tl.int64)
    slot = tl.load(read + seq)
    s = tl.load(state + slot * size + place, stored(slot, entry, is_value, KEY_DIM), 0.0)
    shared = head // (value_heads // key_heads) * KEY_DIM
    # A chunk ends at the border of the snapshot, so that the state there is known.
    to = tl.load(snapshot + seq)
    border = tl.where(to >= 0, first + tl.load(snapshot_rows + seq), stop)
    before = tl.cdiv(border - first, CHUNK)
    number = tl.arange(0, CHUNK)
    passed = number[:, None] >= number[None, :]
    for chunk in range(0, before + tl.cdiv(stop - border, CHUNK)):
        begin = tl.where(chunk < before, first + chunk * CHUNK, border + (chunk - before) * CHUNK)
        row = begin + number
        inside = row < tl.where(chunk < before, border, stop)
        # Rows beyond the end change nothing: they decay by e⁰, and their rate is 0.
        total = tl.cumsum(tl.load(g + row * value_heads + head, inside, 0.0), 0)
        rate = tl.load(beta + row * value_heads + head, inside, 0.0)
        between = tl.exp(tl.where(passed, total[:, None] - total[None, :], 0.0))
        decayed = tl.exp(total)[:, None]

        is_entry = inside[:, None] & is_key[None, :]
        key = tl.load(k + row[:, None] * k_stride + shared + entry[None, :], is_entry, 0.0)
        key = key.to(tl.float32)
        key *= (1.0 / tl.sqrt(tl.sum(key * key, 1) + eps))[:, None]
        # (1 + system) · delta = rate · (values − what the state before the chunk says). The inverse
        # of the unit triangular matrix, row by row.
        products = tl.dot(key, tl.trans(key), input_precision=PRECISION)
        earlier = number[:, None] > number[None, :]
        system = tl.where(earlier, products * between * rate[:, None], 0.0)
        inverse = (number[:, None] == number[None, :]).to(tl.float32)
        for i in range(1, CHUNK):
            is_row = number == i
            factors = tl.sum(tl.where(is_row[:, None], system, 0.0), 0)
            change = tl.sum(factors[:, None] * inverse, 0)
            inverse -= tl.where(is_row[:, None], change[None, :], 0.0)
        said = tl.dot(key, s, input_precision=PRECISION) * decayed
        at = v + row[:, None] * v_stride + head * VALUE_DIM + column[None, :]
        is_result = inside[:, None] & is_value[None, :]
        values = tl.load(at, is_result, 0.0).to(tl.float32)
        delta = tl.dot(inverse, (values - said) * rate[:, None], input_precision=PRECISION)

        query = tl.load(q + row[:, None] * q_stride + shared + entry[None, :], is_entry, 0.0)
        query = query.to(tl.float32)
        query *= (scale / tl.sqrt(tl.sum(query * query, 1) + eps))[:, None]
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        result = tl.dot(query, s, input_precision=PRECISION) * decayed
        weights = tl.where(passed, products * between, 0.0)
        result = tl.dot(weights, delta, result, input_precision=PRECISION)
        at = out + (row[:, None] * value_heads + head) * VALUE_DIM + column[None, :]
        tl.store(at, result.to(out.dtype.element_ty), is_result)

        whole = tl.sum(tl.where(number == CHUNK - 1, total, 0.0), 0)
        left = key * tl.exp(whole - total)[:, None]
        s = tl.dot(tl.trans(left), delta, s * tl.exp(whole), input_precision=PRECISION)
        if chunk == before - 1:
            kept = stored(to, entry, is_value, KEY_DIM)
            tl.store(state + to * size + place, s, kept)
    to = tl.load(write + seq)
    tl.store(state + to * size + place, s, stored(to, entry, is_value, KEY_DIM))


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: StateBatch,
) -> Tensor:
    """See :func:`nybble.kernels.recurrent.gated_delta_rule`; heads of a row are contiguous.

    Sequences of fewer rows than a chunk are computed row by row in any batch, so that a decode step
    is the same beside prompts as without them.
    """
    (key_heads, key_dim), (value_heads, value_dim) = k.shape[1:], v.shape[1:]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    values = min(VALUES, max(16, triton.next_power_of_2(value_dim)))
    grid = (len(batch.read), value_heads, triton.cdiv(value_dim, values))
    kernels = [(delta_rule_by_rows_kernel, 4)]
    if batch.max_query >= CHUNK:
        kernels.append((delta_rule_by_chunks_kernel, 8))
    for kernel, num_warps in kernels:
        kernel[grid](
            q,
            k,
            v,
            g.contiguous(),
            beta.contiguous(),
            state,
            out,
            batch.query_start,
            batch.read,
            batch.write,
            batch.snapshot,
            batch.snapshot_rows,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            key_heads,
            value_heads,
            key_dim**-0.5,
            L2_EPS,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            KEYS=max(16, triton.next_power_of_2(key_dim)),
            VALUES=values,
            CHUNK=CHUNK,
            num_warps=num_warps,
            **FUSED,
        )
    return out
