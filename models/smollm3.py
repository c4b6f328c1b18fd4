"""SmolLM3: Llama's layers, every fourth without positions."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder


def smollm3(config: PretrainedConfig) -> Architecture:
    """``no_rope_layers`` is 1 for layers that rotate queries and keys, 0 for those that do not."""
    rope = read.rope(config, read.head_sizes(config)[2])
    windows = read.windows(config) if config.use_sliding_window else None
    ropes = tuple(rope if rotates else None for rotates in config.no_rope_layers)
    return decoder(config, windows=windows, ropes=ropes)


FAMILIES = {"smollm3": smollm3}
