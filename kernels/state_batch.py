"""The states of one step: which of them each sequence reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateBatch:
    """Rows of several sequences in layers that keep a state of a sequence, not keys and values.

    A state lies in a slot. Whether a prompt is computed in one chunk or in several, each row sees
    the state as the row before it left it.

    query_start: int32 ``(seqs + 1,)``, the first row of each sequence, then the number of rows.
    read: int32 ``(seqs,)``, the slot of the state before a sequence's first row; −1 if that is the
        beginning, with a state of zeros.
    write: int32 ``(seqs,)``, the slot for the state after its last row; −1 for none. No other
        sequence of the batch reads it.
    snapshot: int32 ``(seqs,)``, another slot, for the state after its first ``snapshot_rows`` rows;
        −1 for none.
    snapshot_rows: int32 ``(seqs,)``, between 1 and the number of its rows.
    max_query: the most rows any sequence has.
    rows: int64, which rows of the step these are, in order; None for all. later: rows that follow
        those of the same sequences; None for none. So the states between are kept as well.
    """

    query_start: Tensor
    read: Tensor
    write: Tensor
    snapshot: Tensor
    snapshot_rows: Tensor
    max_query: int
    rows: Tensor | None = None
    later: StateBatch | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for tensors which a kernel, given only addresses, would misread."""
        seqs = self.read.shape[0]
        for name in ("query_start", "read", "write", "snapshot", "snapshot_rows"):
            tensor: Tensor = getattr(self, name)
            shape = (seqs + (name == "query_start"),)
            if tensor.shape != shape or tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides "
                    f"{tensor.stride()}, expected contiguous int32 {shape}"
                )

    def compute(self, kernel: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What ``kernel(*inputs, batch)`` computes of all rows, whose first dimension is the rows'.

        kernel: takes the inputs of some rows and the batch of these.
        """
        if self.rows is None:
            return kernel(*inputs, self)
        out: Tensor | None = None
        turn: StateBatch | None = self
        while turn is not None:
            computed = kernel(*(each[turn.rows] for each in inputs), turn)
            if out is None:
                out = computed.new_empty(len(inputs[0]), *computed.shape[1:])
            out[turn.rows] = computed
            turn = turn.later
        assert out is not None
        return out
