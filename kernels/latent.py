"""Products of heads with matrices of their own, as latent attention has them, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.reference import rows_computed


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Each head by a matrix of its own: ``out[t, h] = x[t, h] @ weight[h]``.

    x: ``(tokens, heads, inputs)``; weight: ``(heads, inputs, out)`` of the same dtype.

    Returns ``(tokens, heads, out)``. In bfloat16 rows are padded as those of
    :func:`nybble.kernels.reference.dense_matmul`, so that a row's result does not depend on others.
    """
    rows = x.transpose(0, 1)
    if x.dtype == torch.bfloat16 and x.is_cpu:
        added = rows_computed(len(x)) - len(x)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, added))
    return torch.bmm(rows, weight)[:, : len(x)].transpose(0, 1)
