"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder


def qwen2(config: PretrainedConfig) -> Architecture:
    """Layers may differ in their window: transformers makes ``layer_types`` of the settings."""
    return decoder(
        config,
        windows=read.windows(config),
        attention_options={"bias": True, "output_bias": False},
    )


FAMILIES = {"qwen2": qwen2}
