"""Norms, rotary embeddings and linear layers of a decoder layer, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Norm:
    """A normalization of hidden states.

    kind: ``rms`` is RMSNorm, ``layer`` is LayerNorm.
    offset: added to the stored weight (Gemma stores ``weight − 1``). An RMSNorm with one, 0 too,
        multiplies by the weight in float32 and rounds once; without, normed values are rounded
        before they are multiplied.
    bias: whether a bias is stored beside the weight.
    """

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    offset: float | None = None
    bias: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer.

    rotary_dim: leading entries of a head that are rotated; the others pass through.
    parameters: transformers' ``rope_parameters`` for this layer: ``rope_type``, ``rope_theta``, and
        what the type needs.
    max_position_embeddings: the length that config.json names.
    includes_scaling: whether that length is what scaling reaches, not what it starts from. Only
        asked if ``parameters`` do not name the original length.
    query_beta: rotated queries are multiplied by
        ``1 + query_beta · ln(1 + ⌊position / original_length⌋)``.
    interleaved: whether entries ``2i`` and ``2i + 1`` form a pair, not ``i`` and
        ``i + rotary_dim / 2``.
    """

    rotary_dim: int
    parameters: Mapping[str, Any]
    max_position_embeddings: int
    interleaved: bool = False
    includes_scaling: bool = False
    query_beta: float = 0.0

    @property
    def original_length(self) -> int:
        """Tokens that the model was trained on before its frequencies were scaled."""
        original = self.parameters.get("original_max_position_embeddings")
        return int(original or self.max_position_embeddings)

    @property
    def longest_exact(self) -> int:
        """The longest sequence for which one table of frequencies is what transformers computes.

        ``dynamic`` and ``longrope`` change their frequencies once a sequence passes the original
        length. ``yarn`` and ``linear`` have one table, which serves up to original · factor.
        """
        kind = self.parameters["rope_type"]
        if kind in ("dynamic", "longrope"):
            return self.original_length
        if kind in ("yarn", "linear") and not self.includes_scaling:
            scaled = int(self.original_length * float(self.parameters["factor"]))
            return max(self.max_position_embeddings, scaled)
        return self.max_position_embeddings

    @property
    def longest(self) -> int:
        """The longest sequence that can be asked for.

        A ``longrope`` model serves more than its original length with its long factors, which are
        then used for every position (transformers uses them once a sequence passes that length).
        """
        if self.parameters["rope_type"] == "longrope":
            return self.max_position_embeddings
        return self.longest_exact


@dataclass(frozen=True)
class Linear:
    """A linear layer as checkpoints name it: ``out × inputs``.

    bias: whether the family has a bias here, which a checkpoint must then hold.
    """

    name: str
    out: int
    inputs: int
    bias: bool = False

    @property
    def leaf(self) -> str:
        """The last part of its name, which adapters and quantizers select it by."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Fold:
    """The operation that produces a group's inputs, of which each can be scaled there (AWQ).

    module: a norm, or a linear layer of which rows ``start`` to ``stop`` produce the inputs.
    shared: how many inputs one row produces: as many query heads read the same values.
    run: inputs ``i`` to ``i + run`` come of as many rows, and the next ``run`` of the same rows if
        they are shared: the size of a head.
    """

    module: str
    start: int = 0
    stop: int = 0
    shared: int = 1
    run: int = 1

    @property
    def is_linear(self) -> bool:
        """Whether ``module`` is a linear layer, not a norm."""
        return self.stop > 0


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that read the same input: one matmul if their weights allow it.

    name: of the weight that holds them all.
    fold: None if what produces the input is not linear in each of its outputs.
    multipliers: of the outputs, with what adapters add to them: runs of so many, each multiplied by
        the same, one after the other; none for 1.
    """

    name: str
    linears: tuple[Linear, ...]
    fold: Fold | None = None
    multipliers: tuple[tuple[int, float], ...] = ()

    @property
    def out(self) -> int:
        return sum(linear.out for linear in self.linears)

    @property
    def inputs(self) -> int:
        return self.linears[0].inputs

    def multiplied(self, *runs: tuple[int, float]) -> LinearGroup:
        """This group with these ``multipliers``."""
        first = runs[0][1]
        if any(value != first for _, value in runs):
            return replace(self, multipliers=runs)
        return self if first == 1 else replace(self, multipliers=((self.out, first),))

    @property
    def module(self) -> str:
        """The module that holds the group: attention or MLP."""
        return self.name.rpartition(".")[0]
