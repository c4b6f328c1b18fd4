"""Which rows of a step use which adapter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoRABatch:
    """Which adapter slot each row of a step uses.

    slots: int32 ``(tokens,)``, −1 for the base model.
    order: int32 ``(adapted,)``, the rows that have an adapter, sorted by slot.
    segment_starts: int32 ``(segments + 1,)``, where each slot's rows begin in ``order``, then the
        length of ``order``.
    segment_slots: int32 ``(segments,)``, the slot of each segment, all different.
    max_segment: the most rows any segment has.
    """

    slots: Tensor
    order: Tensor
    segment_starts: Tensor
    segment_slots: Tensor
    max_segment: int

    def __post_init__(self) -> None:
        """Raises ValueError for tensors which a kernel, given only addresses, would misread."""
        lengths = {
            "slots": self.slots.numel(),
            "order": self.order.numel(),
            "segment_starts": self.segment_slots.numel() + 1,
            "segment_slots": self.segment_slots.numel(),
        }
        for name, length in lengths.items():
            tensor: Tensor = getattr(self, name)
            if tensor.shape != (length,) or tensor.dtype != torch.int32 or tensor.stride() != (1,):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides "
                    f"{tensor.stride()}, expected contiguous int32 ({length},)"
                )

    def rows_by_slot(self, slots: Collection[int]) -> list[tuple[int, Tensor]]:
        """Those of these slots that any row uses, each with its rows, int64. Waits for a device."""
        starts = self.segment_starts.tolist()
        return [
            (slot, self.order[starts[index] : starts[index + 1]].long())
            for index, slot in enumerate(self.segment_slots.tolist())
            if slot in slots
        ]

    @classmethod
    def of(cls, slots: Sequence[int], device: torch.device | str) -> LoRABatch | None:
        """The batch of rows with these slots; None if none has an adapter."""
        order = [row for row, slot in enumerate(slots) if slot >= 0]
        if not order:
            return None
        order.sort(key=lambda row: slots[row])
        starts, used = [0], []
        for slot, rows in groupby(order, key=lambda row: slots[row]):
            used.append(slot)
            starts.append(starts[-1] + sum(1 for _ in rows))

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(device)

        return cls(
            slots=tensor(slots),
            order=tensor(order),
            segment_starts=tensor(starts),
            segment_slots=tensor(used),
            max_segment=max(end - start for start, end in pairwise(starts)),
        )
