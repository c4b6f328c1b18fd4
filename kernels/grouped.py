"""Linear layers of which every row uses those it was routed to: a mixture's experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.kernels.matmul import linear
from nybble.kernels.packed import DenseWeight, PackedWeight


@dataclass(frozen=True)
class ExpertWeights:
    """One linear layer of every expert.

    weights: one for each expert, all ``(out_features, in_features)``. They may be stored in
        different ways.
    """

    weights: Sequence[PackedWeight | DenseWeight]

    def __post_init__(self) -> None:
        sizes = {(weight.out_features, weight.in_features) for weight in self.weights}
        if len(sizes) != 1:
            raise ValueError(f"experts are all of one size; given are {sorted(sizes)}")

    @property
    def out_features(self) -> int:
        return self.weights[0].out_features

    @property
    def in_features(self) -> int:
        return self.weights[0].in_features


def grouped_matmul(
    x: Tensor, experts: ExpertWeights, expert_ids: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Every row times the weights of its experts; see :func:`nybble.kernels.reference.grouped_matmul`.

    x: ``(rows, in_features)``, or ``(rows, top_k, in_features)`` with an input for each expert.
    expert_ids: int64 ``(rows, top_k)``, different within a row.
    weights: float32 ``(rows, top_k)``, what the results are multiplied by before they are added.

    Returns ``(rows, top_k, out_features)``, or their weighted sum ``(rows, out_features)`` if
    ``weights`` are given, in the dtype of ``x``. Experts without rows are not read.
    """
    top_k = expert_ids.shape[1]
    inputs = x.flatten(0, -2) if x.ndim == 3 else x
    # Positions in expert_ids, sorted by expert.
    chosen, order = expert_ids.flatten().sort(stable=True)
    rows = order if x.ndim == 3 else order // top_k
    counts = torch.bincount(chosen, minlength=len(experts.weights)).tolist()
    out = x.new_empty(len(order), experts.out_features)
    start = 0
    for weight, count in zip(experts.weights, counts, strict=True):
        if count:
            part = slice(start, start + count)
            out[order[part]] = linear(inputs[rows[part]], weight)
            start += count
    return combine(out.view(*expert_ids.shape, -1), weights)


def combine(out: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sum ``(rows, out)`` of ``out (rows, top_k, out)``; ``out`` if None is given."""
    if weights is None:
        return out
    return (out.float() * weights[..., None]).sum(1).to(out.dtype)
