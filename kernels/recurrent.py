"""Plain PyTorch references of what layers with states compute; a part of kernels/reference.py.

Rows are computed one after the other, each from the state that the row before it left, so that the
result does not depend on how a sequence is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nybble.kernels.state_batch import StateBatch

# Added to the squares of a query or key before it is divided by their root.
L2_EPS = 1e-6


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, batch: StateBatch
) -> Tensor:
    """A causal convolution of each channel by itself over the last rows of its sequence.

    ``y[t, c] = bias[c] + Σ_j weight[j, c] · x[t − taps + 1 + j, c]``, summed in this order in
    float32 and rounded once.

    x: ``(tokens, channels)``.
    weight: float32 ``(taps, channels)``; bias: float32 ``(channels,)``.
    state: of the dtype of ``x``, ``(slots, taps − 1, channels)``: the last rows of x, the newest
        last. Written in place.

    Returns ``(tokens, channels)``.
    """
    taps = len(weight)
    out = torch.empty_like(x)
    for index, first, stop in _sequences(batch):
        before = _before(state, batch, index)
        rows = torch.cat((before, x[first:stop]))
        total = torch.zeros_like(rows[taps - 1 :], dtype=torch.float32)
        if bias is not None:
            total += bias
        for tap in range(taps):
            total = total + rows[tap : tap + len(total)].float() * weight[tap]
        out[first:stop] = total.to(x.dtype)
        _keep(state, int(batch.write[index]), rows[len(rows) - taps + 1 :])
        reached = int(batch.snapshot_rows[index])
        _keep(state, int(batch.snapshot[index]), rows[reached : reached + taps - 1])
    return out


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: StateBatch,
) -> Tensor:
    """Linear attention with a decaying state and the delta rule (Yang et al. 2024).

    Of each value head a row changes the state ``S (key_dim, value_dim)`` so: ``S ← e^g · S``, then
    ``S ← S + k ⊗ β · (v − kᵀS)``; it reads ``qᵀS / √key_dim``. Queries and keys are divided by
    their length before. All is computed in float32.

    q, k: ``(tokens, key_heads, key_dim)``. A key head serves consecutive value heads.
    v: ``(tokens, value_heads, value_dim)``.
    g, beta: float32 ``(tokens, value_heads)``, ``g ≤ 0``.
    state: float32 ``(slots, value_heads, key_dim, value_dim)``. Written in place.

    Returns ``(tokens, value_heads, value_dim)`` of the dtype of ``v``.
    """
    shared = v.shape[1] // k.shape[1]
    queries, keys = (_unit(each.float()).repeat_interleave(shared, dim=1) for each in (q, k))
    queries = queries * q.shape[-1] ** -0.5
    values, decay = v.float(), g.exp()
    out = torch.empty_like(values)
    for index, first, stop in _sequences(batch):
        s = _before(state, batch, index)
        for row in range(first, stop):
            key = keys[row][:, :, None]
            s = s * decay[row][:, None, None]
            delta = (values[row] - (s * key).sum(1)) * beta[row][:, None]
            s = s + key * delta[:, None]
            out[row] = (s * queries[row][:, :, None]).sum(1)
            if row - first + 1 == int(batch.snapshot_rows[index]):
                _keep(state, int(batch.snapshot[index]), s)
        _keep(state, int(batch.write[index]), s)
    return out.to(v.dtype)


def state_space_scan(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor,
    g: Tensor,
    state: Tensor,
    batch: StateBatch,
) -> Tensor:
    """A state space with a scalar decay for each head (Mamba-2, Dao and Gu 2024).

    Of each head a row changes the state ``S (state_dim, head_dim)`` so:
    ``S ← e^g · S + b ⊗ (dt · x)``; it reads ``cᵀS``. All is computed in float32.

    x: ``(tokens, heads, head_dim)``.
    b, c: ``(tokens, key_groups, state_dim)``. Each serves consecutive heads.
    dt, g: float32 ``(tokens, heads)``, ``g ≤ 0``.
    state: float32 ``(slots, heads, state_dim, head_dim)``. Written in place.

    Returns float32 ``(tokens, heads, head_dim)``.
    """
    shared = x.shape[1] // b.shape[1]
    keys, queries = (each.float().repeat_interleave(shared, dim=1) for each in (b, c))
    values, decay = x.float() * dt[..., None], g.exp()
    out = torch.empty_like(values)
    for index, first, stop in _sequences(batch):
        s = _before(state, batch, index)
        for row in range(first, stop):
            s = s * decay[row][:, None, None] + keys[row][:, :, None] * values[row][:, None]
            out[row] = (s * queries[row][:, :, None]).sum(1)
            if row - first + 1 == int(batch.snapshot_rows[index]):
                _keep(state, int(batch.snapshot[index]), s)
        _keep(state, int(batch.write[index]), s)
    return out


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """``x · silu(gate)``, RMS-normed in ``groups`` equal parts, and multiplied by ``weight``.

    x: float32 ``(tokens, width)``; gate: of the model's dtype. Computed in float32 and rounded to
    the dtype of ``gate`` before the multiplication by ``weight``, which has that dtype too.
    """
    gated = (x * torch.nn.functional.silu(gate.float())).view(len(x), groups, -1)
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return weight * normed.view(x.shape).to(gate.dtype)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _sequences(batch: StateBatch) -> Iterator[tuple[int, int, int]]:
    """The index of each sequence, its first row, and the first row after it."""
    starts = batch.query_start.tolist()
    yield from ((index, *starts[index : index + 2]) for index in range(len(starts) - 1))


def _before(state: Tensor, batch: StateBatch, index: int) -> Tensor:
    slot = int(batch.read[index])
    return torch.zeros_like(state[0]) if slot < 0 else state[slot]


def _keep(state: Tensor, slot: int, value: Tensor) -> None:
    if slot >= 0:
        state[slot] = value
