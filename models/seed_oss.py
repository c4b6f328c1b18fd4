"""Seed-OSS: Llama's layers with biases on queries, keys and values."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models.llama import decoder


def seed_oss(config: PretrainedConfig) -> Architecture:
    """The output projection has a bias of its own setting."""
    return decoder(config, attention_options={"output_bias": bool(config.attention_out_bias)})


FAMILIES = {"seed_oss": seed_oss}
