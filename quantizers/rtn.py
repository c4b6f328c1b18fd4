"""Round-to-nearest quantization of one weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.quantizers.affine import AffineWeight, grid, nearest_codes


def quantize_affine(weight: Tensor, group_size: int, *, sym: bool, bits: int = 4) -> AffineWeight:
    """Nearest codes for ``weight (out, in)``; ``group_size`` must divide the inputs."""
    out, columns = weight.shape
    grouped = weight.float().view(out, columns // group_size, group_size)
    scales, zeros = grid(grouped.amin(-1), grouped.amax(-1), sym=sym, bits=bits)
    codes = nearest_codes(grouped, scales[..., None], zeros[..., None], bits=bits)
    g_idx = torch.arange(columns, device=weight.device) // group_size
    return AffineWeight(codes.to(torch.uint8).view(out, columns), scales, zeros, g_idx, bits)
