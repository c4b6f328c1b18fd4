"""What follows the mixer in a decoder layer, as data: an MLP, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from nybble.kernels.activation import Activation
from nybble.kernels.routing import Scoring
from nybble.models.anatomy.linears import LinearGroup


@dataclass(frozen=True)
class ClampedSwiglu:
    """gpt-oss's gate: ``g · sigmoid(alpha · g) · (u + 1)``.

    g is gate, at most ``limit``; u is up, between ``−limit`` and ``limit``.
    """

    alpha: float
    limit: float


@dataclass(frozen=True)
class Xielu:
    """Apertus's activation, whose numbers each layer has learned.

    module: holds ``alpha_p``, ``alpha_n``, ``beta`` and ``eps``, a number each. See
        :func:`nybble.kernels.reference.xielu`, which gets the first as ``softplus(alpha_p)``, the
        second as ``beta + softplus(alpha_n)``.
    """

    module: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of its tensors, relative to the layer."""
        return tuple(f"{self.module}.{leaf}" for leaf in ("alpha_p", "alpha_n", "beta", "eps"))


@dataclass(frozen=True)
class Mlp:
    """A feed-forward block: ``down(activation(gate) · up)``, or ``down(activation(up))``.

    up: gate and up in one group, gate first, if ``gated``.
    clamp, xielu: instead of ``activation``, if it is not None.
    """

    up: LinearGroup
    down: LinearGroup
    activation: Activation = "silu"
    gated: bool = True
    clamp: ClampedSwiglu | None = None
    xielu: Xielu | None = None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear layers in the order of computation."""
        return (self.up, self.down)


@dataclass(frozen=True)
class Router:
    """How a mixture chooses a token's experts, and what it multiplies their outputs by.

    module: holds the weight ``(experts, hidden)``. Logits and scores are float32.
    scoring: what the logits become. ``softmax`` over all experts; ``sigmoid`` of each;
        ``softmax_of_chosen`` over those with the highest logits; ``sparsemixer`` is Phi-3.5-MoE's.
    bias: whether the logits have a bias, which ``module`` then holds.
    correction_bias: a tensor ``(experts,)`` added to the scores for the choice alone; None for
        none.
    renormalize: whether the scores of the chosen experts are divided by their sum.
    least_sum: the least that they are divided by.
    scaling_factor: of all scores.
    groups: the experts are in as many groups of equal size, and only the experts of ``topk_groups``
        groups can be chosen: those with the highest ``group_score``, which is the highest score of
        a group, or the sum of the two highest.
    jitter: sparsemixer leaves out logits that are further below the highest than twice this, as a
        share of the larger of the two.
    aliases: other names that checkpoints have for its tensors, each with the name here.
    """

    module: str
    scoring: Scoring = "softmax"
    bias: bool = False
    correction_bias: str | None = None
    renormalize: bool = False
    least_sum: float = 1e-20
    scaling_factor: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    jitter: float = 0.0
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of its tensors, relative to the layer."""
        names = (self.module + ".weight", self.module + ".bias" if self.bias else None)
        return tuple(name for name in (*names, self.correction_bias) if name is not None)


@dataclass(frozen=True)
class Stacked:
    """One tensor ``(experts, rows, …)`` in which some checkpoints hold tensors of all experts.

    name: of the tensor, relative to the layer.
    holds: the names of an expert's tensors in it, relative to the layer; ``{}`` is the number of
        the expert. Each has an equal part of the rows, in this order.
    interleaved: whether their rows take turns instead.
    transposed: whether an expert's matrix is stored as ``(inputs, rows)``.
    """

    name: str
    holds: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: MLPs of which a router chooses ``top_k`` for every token.

    experts: of one shape, under the names which checkpoints with separate experts have.
    stacked: the tensors that other checkpoints have instead; first those that are published.
    always_stacked: whether transformers reads experts in 16 bits from ``stacked`` alone.
    shared: an MLP whose output is added for every token; None for none.
    shared_gate: the module of a weight ``(1, hidden)``; the shared output is multiplied by the
        sigmoid of its product with the input. None for none.
    """

    experts: tuple[Mlp, ...]
    top_k: int
    router: Router
    stacked: tuple[Stacked, ...] = ()
    always_stacked: bool = False
    shared: Mlp | None = None
    shared_gate: str | None = None

    @property
    def activation(self) -> Activation:
        return self.experts[0].activation

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear layers that every token passes: those of the shared expert."""
        return () if self.shared is None else self.shared.groups

    @cached_property
    def expert_groups(self) -> tuple[LinearGroup, ...]:
        """The linear layers of the experts, expert by expert."""
        return tuple(group for expert in self.experts for group in expert.groups)
