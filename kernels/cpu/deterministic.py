"""The C++ kernels without what they leave to PyTorch, whose order of sums depends on the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from nybble.kernels.cpu.build import load
from nybble.kernels.cpu.library import CpuLibrary, library
from nybble.kernels.packed import GroupedKernel, LinearKernel, PackedWeight, Weight


class DeterministicLibrary(CpuLibrary):
    """A row's result is the same in any batch, bit for bit.

    Layers kept in 16 bits are oneDNN's: no batch was found in which they differ, unless it uses
    AMX, from which ``import nybble`` keeps it. But oneDNN promises nothing.
    """

    def linear(self, weight: Weight, dtype: torch.dtype) -> LinearKernel:
        """Raises ValueError for a packed weight which the kernels do not take."""
        self._check(weight)
        return super().linear(weight, dtype)

    def grouped_linear(self, weights: Sequence[Weight], dtype: torch.dtype) -> GroupedKernel:
        """Raises ValueError for packed experts which the kernels do not take."""
        for weight in weights:
            self._check(weight)
        return super().grouped_linear(weights, dtype)

    def _check(self, weight: Weight) -> None:
        if isinstance(weight, PackedWeight) and not self.takes(weight):
            raise ValueError(
                "deterministic: the CPU kernels take weights in groups of a multiple of 8 inputs; "
                f"these are in groups of {weight.group_size}, in the layout {weight.layout}. Turn "
                "deterministic off, or quantize with another group size"
            )


def deterministic_library(dtype: torch.dtype, bits: Literal[8, 16] = 16) -> DeterministicLibrary:
    """Raises ValueError for another dtype than bfloat16, and if the kernels cannot run."""
    if dtype != torch.bfloat16:
        raise ValueError(
            f"deterministic: the dtype is {str(dtype).removeprefix('torch.')}, which PyTorch sums "
            "on the CPU in an order that depends on the batch; choose bfloat16"
        )
    if library() is None:
        raise ValueError(
            "deterministic: the CPU kernels cannot run here (the log says why), and PyTorch sums "
            "in an order that depends on the batch"
        )
    return DeterministicLibrary(load(), bits)
