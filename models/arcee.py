"""Arcee's AFM: Llama's layers with an MLP without a gate."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import plain_mlp


def arcee(config: PretrainedConfig) -> Architecture:
    """``down_proj(relu²(up_proj))``."""
    mlp = plain_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        bias=bool(config.mlp_bias),
    )
    return decoder(config, mlp=mlp)


FAMILIES = {"arcee": arcee}
