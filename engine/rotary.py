"""Tables of rotary positions, with every scaling variant that transformers defines."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nybble.models import Rope


def rotary_table(rope: Rope, length: int, device: torch.device) -> Tensor:
    """cos and sin for positions 0…length−1: float32 ``(2, length, rotary_dim)``.

    Both halves of the last dimension hold the same angles. A ``longrope`` table that goes beyond
    the original length has the long factors throughout.
    """
    inverse, scaling = _frequencies(rope, length, device)
    angles = torch.arange(length, device=device)[:, None] * inverse.to(device, torch.float32)
    # Written where they stay: of a million positions each copy is a gigabyte.
    table = torch.empty(2, length, 2 * angles.shape[1], device=device)
    for half in table.chunk(2, dim=-1):
        torch.cos(angles, out=half[0])
        torch.sin(angles, out=half[1])
    return table.mul_(scaling)


def _frequencies(rope: Rope, length: int, device: torch.device) -> tuple[Tensor, float]:
    """The angle of each pair at position 1, and what cos and sin are multiplied by."""
    kind = rope.parameters["rope_type"]
    if kind == "default":
        # As transformers' models have it. Importing one of them would take seconds at every start.
        exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
        return 1.0 / rope.parameters["rope_theta"] ** exponents, 1.0
    # transformers' functions read these settings of a config and no other.
    config = LlamaConfig(
        head_dim=rope.rotary_dim,
        rope_parameters=dict(rope.parameters),
        max_position_embeddings=rope.max_position_embeddings,
    )
    longest = min(length, rope.original_length + 1) if kind == "longrope" else None
    inverse, scaling = ROPE_INIT_FUNCTIONS[kind](config, device=device, seq_len=longest)
    if longest is not None:  # Phi-3.5-MoE has factors of its own
        mscale = "long_mscale" if longest > rope.original_length else "short_mscale"
        scaling = float(rope.parameters.get(mscale) or scaling)
    return inverse, scaling


def query_scale_table(rope: Rope, length: int, device: torch.device) -> Tensor | None:
    """What rotated queries are multiplied by, float32 ``(length,)``; None if by 1 everywhere."""
    if not rope.query_beta or length <= rope.original_length:
        return None
    turns = (torch.arange(length, device=device) / rope.original_length).floor()
    return 1 + rope.query_beta * turns.log1p()


def identity_table(width: int, length: int, device: torch.device) -> Tensor:
    """A table that rotates nothing, for layers without positions: ``(2, length, width)``."""
    table = torch.zeros(2, length, width, device=device)
    table[0] = 1
    return table
