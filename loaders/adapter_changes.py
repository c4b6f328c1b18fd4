"""What an adapter changes: linear layers, the embedding, the output layer and norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoRAModule:
    """One projection's change: its weight W becomes ``W + scale · b @ a``.

    a: ``(rank, in)``; b: ``(out, rank)``. The rank is 0 if only the bias changes.
    magnitude: ``(out,)``, the norms that the rows of the sum are given, or None to leave them as
        they are (DoRA, Liu et al. 2024).
    added_bias: ``(out,)``, added to the projection's bias after multiplication by ``scale``, or
        None (peft's ``lora_bias``).
    own_bias: ``(out,)``, instead of the projection's bias, or None (peft's ``bias``).
    factors: ``(out,)``, what outputs are multiplied by, the base's bias among them, or None
        ((IA)³, Liu et al. 2022).
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    added_bias: Tensor | None = None
    own_bias: Tensor | None = None
    factors: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def changes_weight(self) -> bool:
        return self.rank > 0 or self.stretches

    @property
    def stretches(self) -> bool:
        """Whether rows of the weight are multiplied by numbers (DoRA, (IA)³)."""
        return self.magnitude is not None or self.factors is not None

    @property
    def changes_bias(self) -> bool:
        return self.added_bias is not None or self.own_bias is not None

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a plain LoRA, so that it can be weighted and added to others."""
        return not (self.stretches or self.changes_bias)

    def stretch(self, weight: Tensor, start: int = 0) -> Tensor | None:
        """What rows of ``W + scale · b @ a`` are multiplied by, float32 ``(rows,)``; or None.

        weight: rows of W from ``start`` on.
        """
        if self.factors is not None:
            return self.factors[start : start + len(weight)].to(weight.device, torch.float32)
        if self.magnitude is None:
            return None
        magnitude = self.magnitude[start : start + len(weight)].float()
        norms: Tensor = torch.linalg.vector_norm(self._sum(weight, start), dim=1)
        return magnitude.to(norms.device) / norms

    def merged(self, weight: Tensor) -> Tensor:
        """The changed weight, float32 ``(out, in)``, of the whole W."""
        stretch = self.stretch(weight)
        whole = self._sum(weight, 0)
        return whole if stretch is None else whole * stretch[:, None]

    def bias(self, base: Tensor | None) -> Tensor | None:
        """The changed bias, float32 ``(out,)``, of the projection's own; None if there is none."""
        bias = base if self.own_bias is None else self.own_bias
        if bias is not None and self.factors is not None:
            bias = bias.float() * self.factors.to(bias.device, torch.float32)
        if self.added_bias is None:
            return None if bias is None else bias.float()
        added = self.scale * self.added_bias.float()
        return added if bias is None else bias.float() + added

    def _sum(self, weight: Tensor, start: int) -> Tensor:
        b = self.b[start : start + len(weight)].to(weight.device, torch.float32)
        return weight.float() + self.scale * (b @ self.a.to(weight.device, torch.float32))


@dataclass(frozen=True)
class MatrixChange:
    """How the embedding or the output layer W ``(vocab, hidden)`` changes, in this order.

    If the vocabulary was resized, what is not None has its number of rows, and not W's.

    base: ``(vocab, hidden)``, what the change was trained on, instead of W; None for W.
    whole: ``(vocab, hidden)``, instead of W and base, or None.
    ids, rows: int64 ``(n,)``, ascending, and ``(n, hidden)``: instead of W's rows of these tokens;
        None without such rows.
    low_rank: what is added to W then (``a`` is ``(rank, hidden)``, ``b`` is ``(vocab, rank)``), or
        None.
    """

    base: Tensor | None = None
    whole: Tensor | None = None
    ids: Tensor | None = None
    rows: Tensor | None = None
    low_rank: LoRAModule | None = None

    @property
    def matrix(self) -> Tensor | None:
        """``(vocab, hidden)``, which is used instead of W; None for W."""
        return self.base if self.whole is None else self.whole

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a plain LoRA, so that it can be weighted and added to others."""
        plain = self.low_rank is None or self.low_rank.is_low_rank
        return plain and self.whole is None and self.ids is None

    def merged(self, weight: Tensor, rows: int | None = None) -> Tensor:
        """The changed matrix, float32.

        rows: how many tokens it has then; None for as many as W.
        """
        matrix = weight.float() if self.matrix is None else self.matrix.float()
        matrix = resized(matrix, rows)
        if self.ids is not None and self.rows is not None:
            matrix = matrix.index_copy(0, self.ids, self.rows.float())
        return matrix if self.low_rank is None else self.low_rank.merged(matrix)


def resized(matrix: Tensor, rows: int | None) -> Tensor:
    """A matrix with so many rows, of which new ones are zero; None for as many as it has."""
    if rows is None or rows == len(matrix):
        return matrix
    return torch.nn.functional.pad(matrix[:rows], (0, 0, 0, max(0, rows - len(matrix))))


@dataclass(frozen=True)
class LoRAAdapter:
    """An adapter that fits its base.

    modules: by the name of the base's linear layer in transformers.
    digest: 16 bytes that differ if the files' content differs.
    embedding, head: changes of the embedding and of the output layer; None if there is none. If
        these are one matrix in the base, each is changed by its own change alone.
    invocation: of an aLoRA, the tokens from whose last occurrence in the prompt on it is active;
        empty for an adapter that is active everywhere.
    norms: weights and biases instead of the base's, by the absolute names of the tensors.
    vocab: how many tokens it has rows for in the embedding and in the output layer, if that is not
        as many as the base has; None otherwise. Matrices of its own have so many rows.
    """

    modules: Mapping[str, LoRAModule]
    digest: bytes
    embedding: MatrixChange | None = None
    head: MatrixChange | None = None
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    vocab: int | None = None

    @property
    def rank(self) -> int:
        """The highest rank of any module."""
        ends = (end.low_rank for end in (self.embedding, self.head) if end is not None)
        modules = (*self.modules.values(), *(module for module in ends if module is not None))
        return max((module.rank for module in modules), default=0)
