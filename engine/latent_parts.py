"""Latent attention: its cache holds one latent of a token, which all heads attend to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.engine.parts import NormPart, Projection, Step
from nybble.kernels.backend import Backend
from nybble.kernels.latent import per_head
from nybble.models import LatentAttention

if TYPE_CHECKING:
    from nybble.engine.adapter_slots import StepAdapters


@dataclass(frozen=True)
class Expansion:
    """The layer that computes keys and values from latents, by heads, and adapters on it.

    index: its place among the model's projections, by which adapters know it.
    weight: ``(heads, key_dim + value_dim, latent_dim)``.
    bias: ``(heads, key_dim + value_dim)``, or None. That of keys changes nothing, because it adds
        the same to the scores of all keys; so do shifts of adapters.
    """

    index: int
    key_dim: int
    weight: Tensor
    bias: Tensor | None

    def absorb(self, queries: Tensor, adapters: StepAdapters | None) -> Tensor:
        """Queries of latents ``(tokens, heads, latent_dim)`` from those of keys.

        queries: ``(tokens, heads, key_dim)``.
        """
        keys = self.weight[:, : self.key_dim]
        out = per_head(queries, keys)
        if adapters is None:
            return out
        for rows, a, b, outputs in adapters.by_slot(self.index):
            # Small sums in float64, rounded to float32: their order does not show.
            own = queries[rows].double()
            of_keys = self._by_head(b.T)[:, :, : self.key_dim].double()  # (rank, heads, key_dim)
            change = torch.einsum("thk,rhk->thr", own, of_keys) @ a.double()
            if outputs is not None:
                gains = self._by_head(outputs[0])[:, : self.key_dim]
                change += per_head(own * gains, keys.double())
            out[rows] = (out[rows].double() + change).float().to(out.dtype)
        return out

    def values(self, latents: Tensor, adapters: StepAdapters | None) -> Tensor:
        """Each head's value ``(tokens, heads, value_dim)`` from the latent that it attended to.

        latents: ``(tokens, heads, latent_dim)``.
        """
        out = per_head(latents, self.weight[:, self.key_dim :].mT)
        if self.bias is not None:
            out = out + self.bias[:, self.key_dim :]
        if adapters is None:
            return out
        for rows, a, b, outputs in adapters.by_slot(self.index):
            of_values = self._by_head(b.T)[:, :, self.key_dim :].double()
            before, shrunk = out[rows].double(), latents[rows].double() @ a.double().T
            change = torch.einsum("thr,rhv->thv", shrunk, of_values)
            if outputs is not None:
                gains, shifts = self._by_head(outputs)[:, :, self.key_dim :]
                change += gains * before + shifts
            out[rows] = (before + change).float().to(out.dtype)
        return out

    def _by_head(self, outputs: Tensor) -> Tensor:
        """``(…, heads, key_dim + value_dim)`` of the layer's outputs ``(…, out)``."""
        return outputs.reshape(*outputs.shape[:-1], *self.weight.shape[:2])


@dataclass(frozen=True)
class LatentAttentionPart:
    """Latent attention of one layer; see :class:`LatentAttention` for the names.

    layer: index of the cache and of the metadata that it uses, among layers with attention.
    rope: index of the step's rotary embedding it uses.
    """

    about: LatentAttention
    layer: int
    rope: int
    input: Projection
    query_norm: NormPart | None
    query: Projection | None
    latent_norm: NormPart
    expand: Expansion
    output: Callable[[Tensor, StepAdapters | None], Tensor]
    backend: Backend

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        about, tokens = self.about, len(x)
        rotated = about.rope.rotary_dim
        sizes = [about.query_inputs, about.latent_dim, rotated]
        q, latents, key = self.input(x, step.adapters).split_with_sizes(sizes, -1)
        if self.query is not None and self.query_norm is not None:
            q = self.query(self.query_norm(q.contiguous()), step.adapters)
        by_head = q.reshape(tokens, about.heads, -1)
        of_keys, turned = by_head.split_with_sizes((about.key_dim, rotated), -1)
        latents = self.latent_norm(latents.contiguous())
        cache, *scales = step.caches[self.layer]
        batch = step.batches[self.layer]
        self.backend.latent_store(
            turned,
            key,
            latents,
            *step.rotary[self.rope],
            cache,
            batch.slot_mapping,
            *scales,
            interleaved=about.rope.interleaved,
        )
        queries = torch.cat((turned, self.expand.absorb(of_keys, step.adapters)), dim=-1)
        attended = self.backend.latent_attention(
            queries, cache, batch, about.scale, about.latent_dim, *scales
        )
        values = self.expand.values(attended, step.adapters)
        return self.output(values.flatten(1), step.adapters)
