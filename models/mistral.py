"""Mistral 7B and Ministral: Llama's layers with sliding windows."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import config as read
from nybble.models.architecture import Architecture
from nybble.models.llama import decoder


def mistral(config: PretrainedConfig) -> Architecture:
    """All layers have one window, or none."""
    return decoder(config, windows=read.windows(config))


FAMILIES = {"mistral": mistral, "ministral": mistral}
