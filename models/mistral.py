"""Mistral 7B, Mistral 3, Ministral and Ministral 3: Llama's layers, with windows if they say so."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder


def mistral(config: PretrainedConfig) -> Architecture:
    """All layers have one window, or none."""
    return decoder(config, windows=read.windows(config))


def ministral3(config: PretrainedConfig) -> Architecture:
    """Queries are scaled by their positions beyond the length that YaRN scales from."""
    rope = read.rope(config, read.head_sizes(config)[2])
    rope = replace(rope, query_beta=float(rope.parameters.get("llama_4_scaling_beta") or 0.0))
    windows = read.windows(config)
    return decoder(config, windows=windows, ropes=(rope,) * len(windows))


FAMILIES = {"mistral": mistral, "ministral": mistral, "ministral3": ministral3}
