"""Rotary position tables, with every scaling variant transformers defines."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

# Their frequencies change with the length of the sequence once it passes the trained length; up to
# that length they are constant and a table is exact.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def longest_exact_length(config: PretrainedConfig) -> int:
    """The longest sequence for which one table of frequencies is exact."""
    parameters = config.rope_parameters
    if parameters["rope_type"] in _LENGTH_DEPENDENT:
        original = parameters.get("original_max_position_embeddings")
        return int(original or config.max_position_embeddings)
    return int(config.max_position_embeddings)


def rotary_table(config: PretrainedConfig, length: int, device: torch.device) -> Tensor:
    """cos and sin for positions 0…length−1: float32 ``(2, length, head_dim)``."""
    # It reads the rope parameters and head sizes, which every decoder config here has.
    rotary = LlamaRotaryEmbedding(config).to(device)  # type: ignore[arg-type]
    positions = torch.arange(length, device=device)[None]
    # The embedding takes the dtype of its first argument and nothing else from it.
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=device), positions)
    return torch.stack((cos[0], sin[0]))
