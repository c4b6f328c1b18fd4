"""Which experts a token uses, and what their outputs are multiplied by."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

Scoring = Literal["softmax", "sigmoid", "softmax_of_chosen", "sparsemixer"]


class Routing(Protocol):
    """How experts are chosen by their logits: see :class:`nybble.models.Router`."""

    @property
    def scoring(self) -> Scoring: ...
    @property
    def renormalize(self) -> bool: ...
    @property
    def least_sum(self) -> float: ...
    @property
    def scaling_factor(self) -> float: ...
    @property
    def groups(self) -> int: ...
    @property
    def topk_groups(self) -> int: ...
    @property
    def group_score(self) -> Literal["max", "top2"]: ...
    @property
    def jitter(self) -> float: ...


def choose_experts(
    router: Routing, logits: Tensor, top_k: int, correction_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The experts of each row, int64 ``(rows, top_k)``, and their weights, float32 of that shape.

    The experts with the highest scores, the highest first.

    logits: float32 ``(rows, experts)``.
    correction_bias: float32 ``(experts,)``, added to the scores for the choice alone.
    """
    if router.scoring == "sparsemixer":
        return _sparsemixer(logits, top_k, router.jitter)
    if router.scoring == "softmax_of_chosen":
        preference = logits if correction_bias is None else logits + correction_bias
        ids = preference.topk(top_k, dim=-1).indices
        return ids, logits.gather(1, ids).softmax(-1) * router.scaling_factor
    scores = logits.sigmoid() if router.scoring == "sigmoid" else logits.softmax(-1)
    preference = scores if correction_bias is None else scores + correction_bias
    if router.groups > 1:
        preference = _of_best_groups(preference, router)
    ids = preference.topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if router.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=router.least_sum)
    return ids, weights * router.scaling_factor


def _of_best_groups(preference: Tensor, router: Routing) -> Tensor:
    """``preference`` with −inf for the experts of other groups (DeepSeek-V2 and V3)."""
    grouped = preference.view(len(preference), router.groups, -1)
    if router.group_score == "max":
        group_scores = grouped.amax(-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
    best = group_scores.topk(router.topk_groups, dim=-1).indices
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).view_as(preference)


def _sparsemixer(logits: Tensor, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Phi-3.5-MoE: experts one after another, each by a softmax over the logits close to it.

    Liu et al. 2023, "Sparse Backpropagation for MoE Training", without its sampling.
    """
    ids, weights = [], []
    left = logits
    for _ in range(top_k):
        highest, chosen = left.max(-1, keepdim=True)
        # The distance is relative to the larger magnitude of the two, also for logits of experts
        # that were chosen before.
        far = (highest - logits) / torch.maximum(logits.abs(), highest) > 2 * jitter
        ids.append(chosen)
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(1, chosen))
        left = left.scatter(1, chosen, float("-inf"))
    return torch.cat(ids, 1), torch.cat(weights, 1)
