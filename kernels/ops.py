"""The operations between the matmuls: each picks the fastest kernel its inputs allow.

They compute what :mod:`nybble.kernels.reference` defines.
"""

from __future__ import annotations

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.reference import (
    add_rms_norm,
    paged_attention,
    rms_norm,
    rotary_store,
    silu_mul,
)

__all__ = [
    "AttentionBatch",
    "add_rms_norm",
    "paged_attention",
    "rms_norm",
    "rotary_store",
    "silu_mul",
]
