"""Nemotron (Minitron and Nemotron-4): LayerNorms around zero, ReLU² without a gate."""

from __future__ import annotations

from transformers import PretrainedConfig

from nybble.models import Architecture, Norm
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import plain_mlp


def nemotron(config: PretrainedConfig) -> Architecture:
    """A part of each head is rotated."""
    mlp = plain_mlp(
        read.size(config, "hidden_size"),
        read.size(config, "intermediate_size"),
        read.activation(config),
        bias=bool(config.mlp_bias),
    )
    norm = Norm(float(config.norm_eps), kind="layer", offset=1.0, bias=True)
    return decoder(config, mlp=mlp, norm=norm)


FAMILIES = {"nemotron": nemotron}
