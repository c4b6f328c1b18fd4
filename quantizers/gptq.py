"""GPTQ: codes chosen column by column, each column's error spread over those still to come.

Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.loaders.formats import AffineWeight
from nybble.quantizers.affine import grid, nearest_codes


@dataclass(frozen=True)
class GptqSettings:
    """How GPTQ works.

    desc_act: quantize columns in the order of falling input power, so that the most important ones
        are rounded while others are left to compensate.
    static_groups: compute scales from the original weights, with groups in the original column
        order. With desc_act the checkpoint then needs no reordering at run time.
    damp: added to the diagonal of the Hessian, as a fraction of its mean.
    true_sequential: within a block, inputs of later layers come from the quantized earlier ones.
    """

    desc_act: bool = False
    static_groups: bool = False
    damp: float = 0.01
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise ValueError(
                f"damp is {self.damp}, expected a fraction of the diagonal, 0 < damp < 1"
            )


# Up to this many columns are solved one by one: matrix products would not pay.
_COLUMNS_ONE_BY_ONE = 16


def gptq(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    *,
    sym: bool = False,
    bits: int = 4,
    least_zero: int = 0,
    settings: GptqSettings | None = None,
) -> AffineWeight:
    """Quantize ``weight (out, in)`` so that its outputs change least.

    hessian: ``(in, in)``, XᵀX over the calibration inputs in any scaling.
    group_size: inputs that share a scale; it must divide ``in``.
    least_zero: see :func:`nybble.quantizers.affine.grid`.

    Raises ValueError if the Hessian stays singular in spite of the damping.
    """
    settings = settings or GptqSettings()
    out, columns = weight.shape
    # Transposed: every column is then contiguous.
    remaining = weight.float().T.contiguous()
    hessian = hessian.to(torch.float64, copy=True)
    diagonal = hessian.diagonal().clone()
    dead = diagonal <= 0  # inputs that were always zero
    remaining[dead] = 0
    hessian.diagonal().add_(dead.double() + settings.damp * diagonal.mean())
    natural_groups = torch.arange(columns, device=weight.device) // group_size
    order = torch.arange(columns, device=weight.device)
    if settings.desc_act:
        order = diagonal.argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
    g_idx = natural_groups.clone()
    if not settings.static_groups:
        g_idx[order] = natural_groups
    scales = weight.new_empty(columns // group_size, out, dtype=torch.float16)
    zeros = torch.empty_like(scales, dtype=torch.uint8)
    if settings.static_groups:
        grouped = remaining.view(-1, group_size, out)
        scales, zeros = grid(
            grouped.amin(1), grouped.amax(1), sym=sym, bits=bits, least_zero=least_zero
        )
    remaining, groups = remaining[order], g_idx[order].tolist()
    factor = inverse_factor(hessian).float()
    codes = torch.empty_like(remaining, dtype=torch.uint8)
    errors = torch.empty_like(remaining)

    def solve(start: int, stop: int) -> None:
        """Quantize columns ``start``…``stop``−1, to which all errors before have been spread.

        The errors of a half reach the other half in one product, at every scale. Halves are cut
        between groups if possible: a group's scale has to see every error made before it.
        """
        if stop - start > _COLUMNS_ONE_BY_ONE:
            middle = (start + stop) // 2
            if stop - start > group_size:
                middle = -(-middle // group_size) * group_size
            solve(start, middle)
            spread = factor[start:middle, middle:stop].T
            remaining[middle:stop].addmm_(spread, errors[start:middle], alpha=-1)
            solve(middle, stop)
            return
        for column in range(start, stop):
            if not settings.static_groups and column % group_size == 0:
                group = remaining[column : column + group_size]
                scales[groups[column]], zeros[groups[column]] = grid(
                    group.amin(0), group.amax(0), sym=sym, bits=bits, least_zero=least_zero
                )
            scale, zero = scales[groups[column]].float(), zeros[groups[column]].float()
            code = nearest_codes(remaining[column], scale, zero, bits=bits)
            codes[column] = code.to(torch.uint8)
            error = (remaining[column] - (code - zero) * scale) / factor[column, column]
            errors[column] = error
            remaining[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)

    solve(0, columns)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return AffineWeight(
        restored.T.contiguous(), scales.T.contiguous(), zeros.T.contiguous(), g_idx, bits
    )


# Up to this size LAPACK inverts the triangle directly.
_TRIANGLE = 64


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = H⁻¹, from one Cholesky factorization of H.

    With J the reversal of rows, JHJ = LLᵀ gives H = (JLJ)(JLJ)ᵀ with JLJ upper triangular, so
    U = (JLJ)⁻¹: the inverse of H itself is never formed.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if info.item():
        raise ValueError(
            "the Hessian of the calibration inputs is singular; give more calibration text or "
            "a larger damp"
        )
    upper: Tensor = lower.flip(0, 1)
    _invert_upper(upper)
    return upper


def _invert_upper(upper: Tensor) -> None:
    """Invert in place, by halves: a solver would waste work on the zeros of the identity."""
    size = len(upper)
    if size <= _TRIANGLE:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    middle = size // 2
    first, last, corner = upper[:middle, :middle], upper[middle:, middle:], upper[:middle, middle:]
    _invert_upper(first)
    _invert_upper(last)
    corner.copy_(first @ corner @ last).neg_()
