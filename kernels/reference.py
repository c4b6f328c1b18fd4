"""Plain PyTorch references: what every fast kernel must compute. Correct on any device, slow."""

from __future__ import annotations

import torch
from nybble.kernels.packed import PackedWeight
from torch import Tensor


def packed_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x @ weight.dequantize().T + bias`` in float32, rounded once to the dtype of ``x``.

    x: ``(..., in_features)``. Returns ``(..., out_features)``.
    """
    out = x.float() @ weight.dequantize(torch.float32).T
    if weight.bias is not None:
        out += weight.bias.float()
    return out.to(x.dtype)
