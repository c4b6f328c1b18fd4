"""Round-to-nearest quantization of one weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.loaders.formats import (
    AffineFormat,
    AffineWeight,
    CodebookFormat,
    QuantizedWeight,
    WritableFormat,
)
from nybble.quantizers.affine import grid, nearest_codes
from nybble.quantizers.codebook import quantize_codebook


def quantize_affine(
    weight: Tensor, group_size: int, *, sym: bool, bits: int = 4, least_zero: int = 0
) -> AffineWeight:
    """Nearest codes for ``weight (out, in)``; ``group_size`` must divide the inputs."""
    out, columns = weight.shape
    grouped = weight.float().view(out, columns // group_size, group_size)
    scales, zeros = grid(
        grouped.amin(-1), grouped.amax(-1), sym=sym, bits=bits, least_zero=least_zero
    )
    codes = nearest_codes(grouped, scales[..., None], zeros[..., None], bits=bits)
    g_idx = torch.arange(columns, device=weight.device) // group_size
    return AffineWeight(codes.to(torch.uint8).view(out, columns), scales, zeros, g_idx, bits)


def round_to_nearest(weight: Tensor, format: WritableFormat) -> QuantizedWeight:
    """Round ``weight (out, in)`` to newly fitted scales, as ``format`` stores it.

    Raises ValueError for sizes that the format cannot hold.
    """
    out, columns = weight.shape
    format.check_sizes(out, columns)
    if isinstance(format, CodebookFormat):
        return quantize_codebook(
            weight,
            format.quant_type,
            double_quant=format.double_quant,
            blocksize=format.blocksize,
        )
    if not isinstance(format, AffineFormat):
        raise TypeError(f"{format.name} has neither a codebook nor an affine grid")
    return quantize_affine(
        weight,
        format.group_of(columns),
        sym=format.sym,
        bits=format.bits,
        least_zero=format.least_zero,
    )
