"""Qwen3: Llama's layers with norms of every query's and key's head."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder


def qwen3(config: PretrainedConfig) -> Architecture:
    """Layers may differ in their window, as Qwen2's."""
    return decoder(config, windows=read.windows(config), attention_options={"qk_norm": "head"})


FAMILIES = {"qwen3": qwen3}
