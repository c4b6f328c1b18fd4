"""Pieces of memory, what lies in them, and copies that are on their way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Allocation:
    """A piece of device memory: alive as long as a tensor that lies in it.

    graph: the captured graph whose private memory it is, None for no graph's.
    """

    def __init__(self, nbytes: int, graph: object | None) -> None:
        self.nbytes = nbytes
        self.graph = graph


@dataclass(frozen=True)
class Transfer:
    """A copy between pinned memory and the device that may not have happened yet.

    number: which piece of the device's work it is. numbers: what the pinned memory had, or will
    have.
    """

    number: int
    pinned: Tensor
    numbers: Tensor
    to_device: bool

    def finish(self) -> None:
        """Raises RuntimeError where the source is not what it was."""
        if not self.to_device:
            self.pinned.copy_(self.numbers)
        elif not torch.equal(bytes_of(self.pinned), bytes_of(self.numbers)):
            raise RuntimeError(
                "pinned memory was written while a copy from it to the device was in flight"
            )


def place(tensor: Tensor) -> int:
    """The same for tensors that lie in one piece of memory."""
    return tensor.untyped_storage()._cdata


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def bytes_of_storage(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def spoil(memory: Tensor) -> None:
    """NaN in floats, −1 in integers, for memory given as bytes."""
    memory.fill_(255)


def readable(host: Tensor) -> Tensor:
    """Zeros where there are no numbers."""
    return torch.zeros_like(host, device="cpu") if host.is_meta else host
