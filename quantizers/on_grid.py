"""Rounding to a given 4-bit grid: scales and zeros stay, only the codes are chosen.

GPTQ's error compensation (Frantar et al. 2022, see :mod:`nybble.quantizers.gptq`), columns in the
order of falling input power. As the groups are fixed, that order costs nothing at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.loaders.formats import AffineWeight, QuantizedWeight
from nybble.quantizers.gptq import inverse_factor

_DAMP = 0.01
_COLUMNS_ONE_BY_ONE = 16


@dataclass(frozen=True)
class Grid:
    """w[n, k] ∈ scales[n, g] · (levels − zeros[n, g]) with g = g_idx[k].

    levels: float32 ``(codes,)``, by code.
    scales: ``(out, groups)``.
    zeros: ``(out, groups)``, None if all are 0.
    g_idx: int64 ``(in,)``.
    """

    levels: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Grid:
        """The grid that a weight is on; blocks that cross rows become narrower groups."""
        if isinstance(weight, AffineWeight):
            levels = torch.arange(2**weight.bits, dtype=torch.float32)
            return cls(levels, weight.scales, weight.zeros, weight.g_idx)
        width, scales = weight.groups()
        groups = torch.arange(weight.codes.shape[1]) // width
        return cls(weight.levels, scales, None, groups)


class Compensation:
    """How the rounding error of one input is compensated by those still to be rounded."""

    def __init__(self, second_moment: Tensor) -> None:
        """second_moment: ``(in, in)`` of the calibration inputs, in any scaling."""
        self._second_moment = second_moment
        diagonal = second_moment.diagonal()
        self._order = diagonal.argsort(descending=True, stable=True)
        hessian = second_moment[self._order][:, self._order]
        hessian.diagonal().add_((hessian.diagonal() <= 0).float() + _DAMP * diagonal.mean())
        # The damping bounds the condition by 100 · in, which float32 can take.
        try:
            self._factor = inverse_factor(hessian)
        except ValueError:
            self._factor = inverse_factor(hessian.double()).float()

    def output_norm(self, right: Tensor, left: Tensor | None = None) -> float:
        """√mean‖Dx‖² over the calibration inputs, of D = ``left @ right``, or ``right`` alone.

        right ``(rank, in)``, left ``(out, rank)``: a product of low rank is never formed.
        """
        right = right.to(self._second_moment)
        moved = right @ self._second_moment
        if left is None:
            return float((moved * right).sum().clamp(min=0).sqrt())
        left = left.to(right)
        return float(((left.T @ left) * (moved @ right.T)).sum().clamp(min=0).sqrt())

    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """uint8 ``(out, in)`` for ``weight (out, in)``, so that its outputs change least."""
        device = self._factor.device
        # Transposed: every column is then contiguous.
        remaining = weight.to(device).float().T[self._order].contiguous()
        groups = grid.g_idx[self._order.to(grid.g_idx.device)].tolist()
        scales = grid.scales.to(device).float().T.contiguous()
        zeros = (
            torch.zeros_like(scales)
            if grid.zeros is None
            else grid.zeros.to(device).float().T.contiguous()
        )
        by_value = grid.levels.argsort().to(device)
        levels = grid.levels.to(device)[by_value]
        midpoints = (levels[1:] + levels[:-1]) / 2
        divisors = scales.clamp(min=torch.finfo(torch.float32).tiny)
        places = torch.empty(remaining.shape, dtype=torch.uint8, device=device)
        errors = torch.empty_like(remaining)

        def solve(start: int, stop: int) -> None:
            """Round columns ``start``…``stop``−1, to which all errors before have been spread."""
            if stop - start > _COLUMNS_ONE_BY_ONE:
                middle = (start + stop) // 2
                solve(start, middle)
                spread = self._factor[start:middle, middle:stop].T
                remaining[middle:stop].addmm_(spread, errors[start:middle], alpha=-1)
                solve(middle, stop)
                return
            for column in range(start, stop):
                group, row = groups[column], self._factor[column]
                exact = remaining[column]
                place = torch.bucketize(exact / divisors[group] + zeros[group], midpoints)
                places[column] = place
                rounded = (levels[place] - zeros[group]) * scales[group]
                errors[column] = (exact - rounded) / row[column]
                remaining[column + 1 : stop].addr_(row[column + 1 : stop], errors[column], alpha=-1)

        solve(0, len(remaining))
        codes = torch.empty_like(places)
        codes[self._order] = by_value.to(torch.uint8)[places.int()]
        return codes.T.contiguous().to(weight.device)
