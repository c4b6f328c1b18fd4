"""State spaces with a scalar decay for each head (Mamba-2): the scan, and the norm after it.

kernels/recurrent.py defines the results. One program reads and writes a part of a state, so that no
other sees it half written.

A sequence of many rows is computed in chunks, in the dual form (Dao and Gu 2024, "Transformers are
SSMs"): within a chunk rows attend to each other, with the decay between them in place of a softmax;
what was before the chunk, they read from the state. Both are matrix products. mamba_ssm computes
the states of all chunks at once and needs five kernels; here a program takes one head through its
chunks, because heads are many, and keeps the state in registers. Its products with states and
decays are TF32, those of ``b`` with ``c`` exact; states are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.state_batch import StateBatch
from nybble.kernels.triton.activation import activated
from nybble.kernels.triton.device import FUSED
from nybble.kernels.triton.recurrent import PRECISION, stored

# Rows; more of them, or fewer warps, would spill registers.
CHUNK = 16
VALUES = 32  # of a program
BY_ROWS_WARPS, BY_CHUNKS_WARPS = 4, 8


@triton.jit
def scan_by_rows_kernel(
    x,
    b,
    c,
    dt,
    g,
    state,
    out,
    query_start,
    read,
    write,
    snapshot,
    snapshot_rows,
    x_stride,
    b_stride,
    c_stride,
    groups,
    heads,
    STATE_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
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
    is_key, is_value = entry < STATE_DIM, column < HEAD_DIM
    place = head * (STATE_DIM * HEAD_DIM) + entry[:, None] * HEAD_DIM + column[None, :]
    size = (heads * (STATE_DIM * HEAD_DIM)).to(tl.int64)
    slot = tl.load(read + seq)
    s = tl.load(state + slot * size + place, stored(slot, entry, is_value, STATE_DIM), 0.0)
    to, border = tl.load(snapshot + seq), first + tl.load(snapshot_rows + seq) - 1
    shared = head // (heads // groups) * STATE_DIM
    for row in range(first, stop):
        key = tl.load(b + row * b_stride + shared + entry, is_key, 0.0).to(tl.float32)
        query = tl.load(c + row * c_stride + shared + entry, is_key, 0.0).to(tl.float32)
        values = tl.load(x + row * x_stride + head * HEAD_DIM + column, is_value, 0.0)
        added = values.to(tl.float32) * tl.load(dt + row * heads + head)
        s = s * tl.exp(tl.load(g + row * heads + head)) + key[:, None] * added[None, :]
        value = tl.sum(s * query[:, None], 0)
        tl.store(out + (row * heads + head) * HEAD_DIM + column, value, is_value)
        if row == border:
            tl.store(state + to * size + place, s, stored(to, entry, is_value, STATE_DIM))
    to = tl.load(write + seq)
    tl.store(state + to * size + place, s, stored(to, entry, is_value, STATE_DIM))


@triton.jit
def scan_by_chunks_kernel(
    x,
    b,
    c,
    dt,
    g,
    state,
    out,
    query_start,
    read,
    write,
    snapshot,
    snapshot_rows,
    x_stride,
    b_stride,
    c_stride,
    groups,
    heads,
    STATE_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
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
    is_key, is_value = entry < STATE_DIM, column < HEAD_DIM
    place = head * (STATE_DIM * HEAD_DIM) + entry[:, None] * HEAD_DIM + column[None, :]
    size = (heads * (STATE_DIM * HEAD_DIM)).to(tl.int64)
    slot = tl.load(read + seq)
    s = tl.load(state + slot * size + place, stored(slot, entry, is_value, STATE_DIM), 0.0)
    shared = head // (heads // groups) * STATE_DIM
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
        # Rows beyond the end change nothing: they decay by e⁰, and add 0.
        total = tl.cumsum(tl.load(g + row * heads + head, inside, 0.0), 0)
        is_entry = inside[:, None] & is_key[None, :]
        key = tl.load(b + row[:, None] * b_stride + shared + entry[None, :], is_entry, 0.0)
        query = tl.load(c + row[:, None] * c_stride + shared + entry[None, :], is_entry, 0.0)
        is_result = inside[:, None] & is_value[None, :]
        at = x + row[:, None] * x_stride + head * HEAD_DIM + column[None, :]
        added = tl.load(at, is_result, 0.0).to(tl.float32)
        added *= tl.load(dt + row * heads + head, inside, 0.0)[:, None]

        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        between = tl.exp(tl.where(passed, total[:, None] - total[None, :], 0.0))
        weights = tl.where(passed, products * between, 0.0)
        result = tl.dot(query.to(tl.float32), s, input_precision=PRECISION)
        result *= tl.exp(total)[:, None]
        result = tl.dot(weights, added, result, input_precision=PRECISION)
        at = out + (row[:, None] * heads + head) * HEAD_DIM + column[None, :]
        tl.store(at, result, is_result)

        whole = tl.sum(tl.where(number == CHUNK - 1, total, 0.0), 0)
        added *= tl.exp(whole - total)[:, None]
        keys = tl.trans(key.to(tl.float32))
        s = tl.dot(keys, added, s * tl.exp(whole), input_precision=PRECISION)
        if chunk == before - 1:
            tl.store(state + to * size + place, s, stored(to, entry, is_value, STATE_DIM))
    to = tl.load(write + seq)
    tl.store(state + to * size + place, s, stored(to, entry, is_value, STATE_DIM))


def state_space_scan(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor,
    g: Tensor,
    state: Tensor,
    batch: StateBatch,
) -> Tensor:
    """See :func:`nybble.kernels.recurrent.state_space_scan`; heads of a row are contiguous.

    Sequences of fewer rows than a chunk are computed row by row in any batch, so that a decode step
    is the same beside prompts as without them.
    """
    (groups, state_dim), (heads, head_dim) = b.shape[1:], x.shape[1:]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    values = min(VALUES, max(16, triton.next_power_of_2(head_dim)))
    grid = (len(batch.read), heads, triton.cdiv(head_dim, values))
    inputs = (x, b, c, dt.contiguous(), g.contiguous(), state, out)
    slots = (batch.query_start, batch.read, batch.write, batch.snapshot, batch.snapshot_rows)
    sizes = (x.stride(0), b.stride(0), c.stride(0), groups, heads)
    constants = {
        "STATE_DIM": state_dim,
        "HEAD_DIM": head_dim,
        "KEYS": max(16, triton.next_power_of_2(state_dim)),
        "VALUES": values,
        "CHUNK": CHUNK,
        **FUSED,
    }
    scan_by_rows_kernel[grid](*inputs, *slots, *sizes, **constants, num_warps=BY_ROWS_WARPS)
    if batch.max_query >= CHUNK:
        scan_by_chunks_kernel[grid](*inputs, *slots, *sizes, **constants, num_warps=BY_CHUNKS_WARPS)
    return out


@triton.jit
def gated_norm_kernel(x, gate, weight, out, gate_stride, groups, width, eps, WIDTH: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    mask = column < width
    column += group * width
    z = tl.load(gate + row * gate_stride + column, mask, 0.0)
    value = tl.load(x + row * (groups * width) + column, mask, 0.0)
    value *= activated(z.to(tl.float32), "silu")
    normed = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps))
    scale = tl.load(weight + column, mask, 0.0).to(tl.float32)
    scaled = normed.to(z.dtype).to(tl.float32) * scale
    tl.store(out + row * (groups * width) + column, scaled.to(z.dtype), mask)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """See :func:`nybble.kernels.recurrent.gated_rms_norm`; entries of a gate are contiguous."""
    rows, entries = x.shape
    out = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    width = entries // groups
    padded = triton.next_power_of_2(width)
    gated_norm_kernel[(rows, groups)](
        x.contiguous(),
        gate,
        weight,
        out,
        gate.stride(0),
        groups,
        width,
        eps,
        WIDTH=padded,
        num_warps=max(1, min(16, padded // 256)),
        **FUSED,
    )
    return out
