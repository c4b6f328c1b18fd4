"""The parts of layers that keep states of a sequence instead of its keys and values.

Each computes the hidden states of a whole step, and reads and writes the states that the step's
batch names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.engine.parts import Projection, Step
from nybble.kernels.backend import Backend
from nybble.models import GatedDeltaNet, StateSpace


@dataclass(frozen=True)
class ShortConvolutionPart:
    """``output(C · convolution(B · x))`` of what ``input`` computes.

    layer: index of the states that it uses.
    weight: float32 ``(taps, channels)``; bias: float32 ``(channels,)`` or None.
    """

    layer: int
    input: Projection
    weight: Tensor
    bias: Tensor | None
    output: Projection
    backend: Backend

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        assert step.state_batch is not None
        before, after, values = self.input(x, step.adapters).chunk(3, dim=-1)
        (state,) = step.states[self.layer]
        convolved = step.state_batch.compute(
            lambda x, rows: self.backend.short_convolution(x, self.weight, self.bias, state, rows),
            before * values,
        )
        return self.output(after * convolved, step.adapters)


@dataclass(frozen=True)
class GatedDeltaNetPart:
    """Linear attention with the gated delta rule.

    layer: index of the states that it uses.
    conv: float32 ``(taps, channels)``.
    decay: float32 ``(value_heads,)``, ``e^A_log``. time_bias: float32 ``(value_heads,)``.
    norm: ``(value_dim,)`` of the model's dtype.
    """

    about: GatedDeltaNet
    layer: int
    input: Projection
    conv: Tensor
    decay: Tensor
    time_bias: Tensor
    norm: Tensor
    output: Projection
    backend: Backend

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        assert step.state_batch is not None
        about, batch = self.about, step.state_batch
        mixed, z, b, a = self._parts(self.input(x, step.adapters))
        recent, states = step.states[self.layer]
        mixed = batch.compute(
            lambda x, rows: self.backend.short_convolution(x, self.conv, None, recent, rows), mixed
        )
        mixed = torch.nn.functional.silu(mixed)
        q, k, v = torch.split(mixed, [about.keys, about.keys, about.values], dim=-1)
        attended = batch.compute(
            lambda q, k, v, g, beta, rows: self.backend.gated_delta_rule(
                q, k, v, g, beta, states, rows
            ),
            q.view(len(x), about.key_heads, about.key_dim),
            k.view(len(x), about.key_heads, about.key_dim),
            v.view(len(x), about.value_heads, about.value_dim),
            -self.decay * torch.nn.functional.softplus(a.float() + self.time_bias),
            b.sigmoid().float(),
        )
        normed = self.backend.rms_norm(attended, self.norm, about.norm_eps)
        gate = torch.nn.functional.silu(z.float()).view(normed.shape)
        return self.output((normed * gate).to(x.dtype).flatten(1), step.adapters)

    def _parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values side by side ``(tokens, channels)``; z, b and a by heads."""
        about, tokens = self.about, len(projected)
        wide, heads = about.channels + about.values, about.value_heads
        if not about.interleaved:
            sizes = [about.channels, about.values, heads, heads]
            mixed, z, b, a = torch.split(projected, sizes, dim=-1)
            return mixed, z.contiguous(), b, a
        shared = heads // about.key_heads
        values = shared * about.value_dim
        of_heads = projected[:, :wide].reshape(tokens, about.key_heads, -1)
        sizes = [about.key_dim, about.key_dim, values, values]
        q, k, v, z = torch.split(of_heads, sizes, dim=-1)
        b, a = projected[:, wide:].reshape(tokens, about.key_heads, -1).chunk(2, dim=-1)
        mixed = torch.cat([each.reshape(tokens, -1) for each in (q, k, v)], dim=-1)
        return mixed, z.contiguous(), b.reshape(tokens, heads), a.reshape(tokens, heads)


@dataclass(frozen=True)
class StateSpacePart:
    """A state space (Mamba-2).

    layer: index of the states that it uses.
    conv: float32 ``(taps, channels)``; bias: float32 ``(channels,)`` or None.
    decay: float32 ``(heads,)``, ``e^A_log``. skip, time_bias: float32 ``(heads,)``.
    norm: ``(heads · head_dim,)`` of the model's dtype, or None.
    """

    about: StateSpace
    layer: int
    input: Projection
    conv: Tensor
    bias: Tensor | None
    decay: Tensor
    skip: Tensor
    time_bias: Tensor
    norm: Tensor | None
    output: Projection
    backend: Backend

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        assert step.state_batch is not None
        about, batch, tokens = self.about, step.state_batch, len(x)
        projected = self.input(x, step.adapters)
        gate, mixed, dt = projected.split_with_sizes(
            (about.values, about.channels, about.heads), -1
        )
        recent, states = step.states[self.layer]
        mixed = batch.compute(
            lambda x, rows: self.backend.short_convolution(x, self.conv, self.bias, recent, rows),
            mixed,
        )
        mixed = torch.nn.functional.silu(mixed)
        values, b, c = mixed.split_with_sizes((about.values, about.keys, about.keys), -1)
        by_head = values.reshape(tokens, about.heads, about.head_dim)
        dt = torch.nn.functional.softplus(dt.float() + self.time_bias)
        read = batch.compute(
            lambda x, b, c, dt, g, rows: self.backend.state_space_scan(
                x, b, c, dt, g, states, rows
            ),
            by_head,
            b.reshape(tokens, about.key_groups, about.state_dim),
            c.reshape(tokens, about.key_groups, about.state_dim),
            dt,
            -self.decay * dt,
        )
        read = (read + self.skip[:, None] * by_head.float()).flatten(1)
        if self.norm is None:
            gated = (read * torch.nn.functional.silu(gate.float())).to(x.dtype)
            return self.output(gated, step.adapters)
        normed = self.backend.gated_rms_norm(
            read, gate, self.norm, about.key_groups, about.norm_eps
        )
        return self.output(normed, step.adapters)
